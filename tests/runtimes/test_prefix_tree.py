"""The tree of shared prefixes: every list keeps its tokens, and nothing is shared that costs more than it saves."""

from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.prefix_tree import MAX_LEVELS, SharedPrefix, group_by_prefix

TOKEN = st.integers(0, 2)
LISTS = st.lists(st.lists(TOKEN, min_size=1, max_size=60), min_size=1, max_size=20)


def grown(lists: list[list[int]]) -> list[tuple[int, SharedPrefix | None]]:
    return group_by_prefix(lists, [len(tokens) - 1 for tokens in lists])


def chain(prefix: SharedPrefix | None) -> list[SharedPrefix]:
    return [] if prefix is None else [*chain(prefix.parent), prefix]


def grid(n_draft: int, k: int) -> list[list[int]]:
    """Prompts of a preference grid: 20 tokens of instructions, 30 of a draft, 10 of a question."""
    task = list(range(20))
    return [
        task + [100 + d] * 30 + [1000 + q] + [2000 + at for at in range(9)] for d in range(n_draft) for q in range(k)
    ]


def test_a_grid_shares_its_instructions_and_each_drafts_example() -> None:
    plan = grown(grid(3, 5))
    assert [i for i, _ in plan] == list(range(15))
    for i, prefix in plan:
        assert [(s.start, s.end, s.level) for s in chain(prefix)] == [(0, 20, 0), (20, 50, 1)], i
    assert len({id(prefix) for _, prefix in plan}) == 3
    assert len({id(prefix.parent) for _, prefix in plan if prefix}) == 1


def test_prompts_of_one_draft_come_together_whatever_their_order() -> None:
    lists = grid(2, 4)
    mixed = [lists[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    plan = grown(mixed)
    assert [i for i, _ in plan] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_what_is_shared_and_what_is_not() -> None:
    plan = grown([list(range(50))] * 4)
    assert all(prefix is not None and prefix.end == 49 for _, prefix in plan)
    assert all(prefix is None for _, prefix in grown([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]))
    assert all(prefix is None for _, prefix in grown([[*range(12), 1], [*range(12), 2]]))  # saves 12 rows
    assert grown([[1] * 100]) == [(0, None)]
    lists = [list(range(60)), list(range(60)), list(range(60))]
    assert all(prefix is not None and prefix.end == 40 for _, prefix in group_by_prefix(lists, [59, 40, 50]))


@given(LISTS, st.data())
def test_every_list_is_planned_once_behind_its_prefix(lists: list[list[int]], data: st.DataObject) -> None:
    most = [data.draw(st.integers(0, len(tokens) - 1)) for tokens in lists]
    plan = group_by_prefix(lists, most)
    assert sorted(i for i, _ in plan) == list(range(len(lists)))
    for i, prefix in plan:
        assert len(chain(prefix)) <= MAX_LEVELS
        for level, part in enumerate(chain(prefix)):
            assert part.level == level and part.start < part.end <= most[i]
            assert list(part.tokens) == lists[i][: part.end]

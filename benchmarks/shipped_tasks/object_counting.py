"""Lists of things of which one kind has to be counted; answers 2 to 13 are equally frequent."""

from __future__ import annotations

from collections.abc import Sequence

from arte_edge.tasks.normalize import WORDS
from arte_edge.tasks.task import Example
from shipped_tasks.draw import Draw, fill

__all__ = ["SEED", "generate"]

SEED = 1202
_ANSWERS = tuple(str(n) for n in range(2, 14))
_MOST_OF_ONE = 5

# "singular/plural"; the kinds share no member, so that counts are unambiguous.
_KINDS = {
    "fruits": (
        *("apple/apples", "banana/bananas", "peach/peaches", "plum/plums", "orange/oranges"),
        *("grape/grapes", "cherry/cherries", "mango/mangoes", "pear/pears", "strawberry/strawberries"),
    ),
    "vegetables": (
        *("carrot/carrots", "onion/onions", "cabbage/cabbages", "potato/potatoes", "leek/leeks"),
        *("cauliflower/cauliflowers", "beetroot/beetroots", "turnip/turnips", "radish/radishes"),
    ),
    "animals": (
        *("dog/dogs", "cat/cats", "goat/goats", "rabbit/rabbits", "hen/hens"),
        *("donkey/donkeys", "snail/snails", "frog/frogs", "duck/ducks", "horse/horses"),
    ),
    "musical instruments": (
        *("flute/flutes", "violin/violins", "drum/drums", "trumpet/trumpets", "guitar/guitars"),
        *("clarinet/clarinets", "harp/harps", "cello/cellos", "accordion/accordions"),
    ),
    "tools": (
        *("hammer/hammers", "saw/saws", "drill/drills", "screwdriver/screwdrivers", "wrench/wrenches"),
        *("chisel/chisels", "pair of pliers/pairs of pliers", "axe/axes"),
    ),
    "pieces of clothing": (
        *("shirt/shirts", "scarf/scarves", "jacket/jackets", "skirt/skirts", "sweater/sweaters"),
        *("coat/coats", "apron/aprons", "hat/hats"),
    ),
    "pieces of furniture": (
        *("chair/chairs", "bed/beds", "bookcase/bookcases", "sofa/sofas", "wardrobe/wardrobes"),
        *("stool/stools", "armchair/armchairs", "desk/desks"),
    ),
}
# (how the list opens, how the question ends)
_PLACES = (
    ("I have", "do I have"),
    ("My neighbour owns", "does my neighbour own"),
    ("We found", "did we find"),
    ("The auction offers", "does the auction offer"),
    ("In the painting I can see", "can I see in the painting"),
    ("Her list names", "does her list name"),
)


def generate() -> dict[str, list[Example]]:
    """Return the three splits."""
    draw = Draw(SEED)

    def make(label: str) -> tuple[str, Example]:
        kind, *others = draw.shuffled(tuple(_KINDS))
        counted = _named(draw, _KINDS[kind], _shares(draw, int(label), len(_KINDS[kind])))
        other_kinds = [thing for other in others[:2] for thing in _KINDS[other]]
        ignored = _named(draw, other_kinds, [draw.integer(1, 4) for _ in range(draw.integer(1, 4))])
        things = draw.shuffled([*counted, *ignored])
        opening, ending = draw.pick(_PLACES)
        listed = f"{', '.join(things[:-1])}, and {things[-1]}"
        text = f"{opening} {listed}. How many {kind} {ending}?"
        return text, Example(text, label)

    return fill(make, _ANSWERS, draw)


def _shares(draw: Draw, total: int, n_things: int) -> list[int]:
    """Split `total` into at most `n_things` counts of 1 to 5, at least two of them."""
    shares: list[int] = []
    while total:
        most = min(_MOST_OF_ONE, total if shares else total - 1)
        least = -(-total // (n_things - len(shares)))
        shares.append(max(least, draw.integer(1, most)))
        total -= shares[-1]
    return shares


def _named(draw: Draw, things: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the counts in words with a different thing each: ``an apple``, ``three dogs``."""
    named = []
    for thing, count in zip(draw.sample(things, len(counts)), counts, strict=True):
        one, many = thing.split("/")
        article = "an" if one[0] in "aeiou" else "a"
        named.append(f"{article} {one}" if count == 1 else f"{WORDS[count]} {many}")
    return named

"""Boolean expressions are Python's, so Python judges the targets."""

import re

from shipped_tasks.boolean_expressions import generate


def test_every_target_is_the_value_of_its_expression() -> None:
    for rows in generate().values():
        for row in rows:
            expression = row.input.removesuffix(" is")
            assert expression != row.input
            assert re.fullmatch(r"(True|False|not|and|or|[() ])+", expression), row
            assert row.target == str(eval(expression)), row

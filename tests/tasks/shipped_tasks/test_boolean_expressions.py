"""Boolean expressions are Python's, so Python judges the targets."""

import ast

from shipped_tasks.boolean_expressions import generate


def value(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=bool() as constant):
            return constant
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value(operand)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(value(part) for part in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(value(part) for part in values)
    raise AssertionError(f"not a Boolean expression: {ast.dump(node)}")


def test_every_target_is_the_value_of_its_expression() -> None:
    for rows in generate().values():
        for row in rows:
            expression = row.input.removesuffix(" is")
            assert expression != row.input
            assert row.target == str(value(ast.parse(expression, mode="eval").body)), row

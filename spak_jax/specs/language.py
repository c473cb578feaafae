"""Invariants that a machine checks: closed expressions over named metrics.

    parameters <= 800_000
    max(data.lengths) < min(system.zero_shot)
    accuracy["12"].low >= 0.999

An expression is parsed by Python's `ast` and evaluated here, over a whitelist: names, attributes
and constant subscripts, which together name a metric; numbers, strings and truth values; arithmetic
without powers; comparisons; `and`, `or`, `not`; `min`, `max` and `len`. Anything else is refused
with its position. Nothing is executed.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Numbers, strings, truth values, or a tuple of them.
Value = Any
Path = tuple[str, ...]
# Gives the value of a metric; raises `Unknown` or `Impossible`, or `ExpressionError` where there
# is none of that name.
Lookup = Callable[[Path], Value]

LONGEST, DEEPEST = 500, 30
LARGEST_NUMBER = 1e30

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_EQUALITY = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_CALLS = {"min": min, "max": max, "len": len}
_ALLOWED = "names, numbers, comparisons, + - * / // %, and, or, not, min, max and len"


class ExpressionError(ValueError):
    """An expression that cannot be read or evaluated; the message says where and what is allowed.

    column: where in it, from 1; None where it is not of one place.
    """

    def __init__(self, message: str, column: int | None = None):
        super().__init__(message if column is None else f"column {column}: {message}")


class Unknown(Exception):
    """A metric that exists but is not known now; the message says why."""


class Impossible(Exception):
    """What an invariant speaks of cannot be had, so that it is broken; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What became of an expression.

    holds: None where that is unknown. measured: the metrics it speaks of, by their names in it.
    reason: why it is unknown, or cannot hold; empty otherwise.
    """

    holds: bool | None
    measured: Mapping[str, Value]
    reason: str = ""


@dataclass(frozen=True)
class Expression:
    """A parsed expression. text: as it was written. tree: of its one expression."""

    text: str
    tree: ast.expr

    def metrics(self) -> list[Path]:
        """What it speaks of, in the order of the text, each once."""
        found: dict[Path, None] = {}

        def visit(node: ast.AST) -> None:
            if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
                found[_path(node)] = None
                return
            # The function that a call names is no metric.
            parts = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
            for part in parts:
                visit(part)

        visit(self.tree)
        return list(found)

    def check(self, lookup: Lookup) -> Verdict:
        """Whether it holds of the metrics that `lookup` gives.

        Raises:
          ExpressionError: a metric does not exist, values do not fit together, or it states
            nothing.
        """
        measured: dict[str, Value] = {}

        def named(path: Path) -> Value:
            value = lookup(path)
            measured[spelled(path)] = value
            return value

        try:
            value = _evaluate(self.tree, named)
        except Unknown as unknown:
            return Verdict(None, measured, str(unknown))
        except Impossible as impossible:
            return Verdict(False, measured, str(impossible))
        if not isinstance(value, bool):
            raise ExpressionError(f"states nothing that could hold: it is {value!r}")
        return Verdict(value, measured)


def parse(text: str) -> Expression:
    """Reads an expression, without evaluating anything.

    Raises:
      ExpressionError: it is no expression of the kind allowed here.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"has {len(text)} characters: at most {LONGEST}")
    try:
        with warnings.catch_warnings():
            # Of odd escapes in strings, say.
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"is no expression ({error.msg})", error.offset) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"is no expression ({error})") from None
    _require_allowed(tree, 0)
    return Expression(text.strip(), tree)


def spelled(path: Path) -> str:
    """A metric's name as an expression writes it: `accuracy["12"].low`."""
    first, *rest = path
    return first + "".join(f".{part}" if part.isidentifier() else f'["{part}"]' for part in rest)


def _require_allowed(node: ast.expr, depth: int) -> None:
    if depth > DEEPEST:
        raise ExpressionError(f"is nested more than {DEEPEST} deep", node.col_offset + 1)

    def require(*parts: ast.expr) -> None:
        for part in parts:
            _require_allowed(part, depth + 1)

    match node:
        case ast.Constant(value=value):
            if isinstance(value, bool | str):
                return
            if not isinstance(value, int | float):
                raise _refused(node, f"{value!r} is neither number, string nor truth value")
            if not abs(value) <= LARGEST_NUMBER:
                raise _refused(node, f"a number beyond {LARGEST_NUMBER:g}")
        case ast.Name() | ast.Attribute() | ast.Subscript():
            _path(node)
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) not in _ARITHMETIC:
                raise _refused(node, f"the operator {type(op).__name__}")
            require(left, right)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            require(operand)
        case ast.BoolOp(values=values):
            require(*values)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for op in ops:
                if type(op) not in _ORDER | _EQUALITY:
                    raise _refused(node, f"the comparison {type(op).__name__}")
            require(left, *comparators)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]):
            if name not in _CALLS:
                raise _refused(node, f"a call of {name}")
            require(*arguments)
        case _:
            raise _refused(node, f"{type(node).__name__} `{ast.unparse(node)[:40]}`")


def _refused(node: ast.expr, what: str) -> ExpressionError:
    return ExpressionError(f"{what} is not allowed: only {_ALLOWED}", node.col_offset + 1)


def _path(node: ast.expr) -> Path:
    """The metric that a chain of attributes and constant subscripts names."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=inner, attr=part):
            return (*_path(inner), part)
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as key)):
            return (*_path(inner), str(key))
    raise _refused(node, f"`{ast.unparse(node)[:40]}` as the name of a metric")


def _evaluate(node: ast.expr, named: Lookup) -> Value:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return named(_path(node))
        case ast.BinOp(left=left, op=op, right=right):
            a, b = (_number(part, _evaluate(part, named)) for part in (left, right))
            try:
                return _number(node, _ARITHMETIC[type(op)](a, b))
            except ZeroDivisionError:
                raise ExpressionError("divides by zero", node.col_offset + 1) from None
            except OverflowError:
                raise _too_large(node) from None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, _evaluate(operand, named))
        case ast.UnaryOp(operand=operand):
            return not _truth(operand, _evaluate(operand, named))
        case ast.BoolOp(op=op, values=values):
            stops = isinstance(op, ast.Or)
            for value in values:
                if _truth(value, _evaluate(value, named)) is stops:
                    return stops
            return not stops
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            first, a = left, _evaluate(left, named)
            for op, second in zip(ops, comparators, strict=True):
                b = _evaluate(second, named)
                if type(op) in _ORDER:
                    holds = _ORDER[type(op)](_number(first, a), _number(second, b))
                elif isinstance(a, str) != isinstance(b, str):
                    raise ExpressionError(f"compares {a!r} with {b!r}", second.col_offset + 1)
                else:
                    for part, value in ((first, a), (second, b)):
                        # NaN differs from everything, which is no reason to hold.
                        if isinstance(value, float):
                            _number(part, value)
                    holds = _EQUALITY[type(op)](a, b)
                if not holds:
                    return False
                first, a = second, b
            return True
        case ast.Call(func=ast.Name(id=name), args=arguments):
            values = [_evaluate(argument, named) for argument in arguments]
            if len(values) == 1 and isinstance(values[0], tuple):
                values = values[0]
            elif name == "len":
                raise ExpressionError(
                    f"len of {values[0]!r}, which is no list", node.col_offset + 1
                )
            if name == "len":
                return len(values)
            if not values:
                raise ExpressionError(f"{name} of nothing", node.col_offset + 1)
            return _CALLS[name](_number(node, value) for value in values)
    raise AssertionError(f"not refused when it was read: {ast.dump(node)}")


def _number(node: ast.expr, value: Value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{value!r} is no number", node.col_offset + 1)
    if isinstance(value, float) and not math.isfinite(value) or abs(value) > LARGEST_NUMBER:
        raise _too_large(node)
    return value


def _too_large(node: ast.expr) -> ExpressionError:
    return ExpressionError(f"gives a number beyond {LARGEST_NUMBER:g}", node.col_offset + 1)


def _truth(node: ast.expr, value: Value) -> bool:
    if not isinstance(value, bool):
        raise ExpressionError(f"{value!r} neither holds nor not", node.col_offset + 1)
    return value

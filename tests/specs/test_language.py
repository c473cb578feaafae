"""The language of invariants: what it says, what it refuses and where, and that it does no harm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spak_jax.specs import language
from spak_jax.specs.language import ExpressionError, Impossible, Unknown

METRICS = {
    ("parameters",): 793_600,
    ("data", "lengths"): (1, 2, 3, 4, 5, 6),
    ("data", "layout"): "packed",
    ("accuracy", "12", "low"): 0.25,
    ("model", "window"): False,
}


def lookup(path):
    if path == ("later",):
        raise Unknown("not measured yet")
    if path == ("never",):
        raise Impossible("does not compile")
    if path not in METRICS:
        raise ExpressionError(f"no metric {language.spelled(path)}")
    return METRICS[path]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("parameters <= 800_000", True),
        ("parameters <= 700_000", False),
        ("max(data.lengths) < 7 <= parameters", True),
        ("1 < parameters < 2", False),
        ("len(data.lengths) == 6 and min(data.lengths, 1) == 1", None),
        ("len(data.lengths) == 6 and min(3, 1, 2) == 1", True),
        ('accuracy["12"].low * 4 == 1.0', True),
        ("accuracy[12].low // 1 == 0 and -parameters % 2 == 0", True),
        ('data.layout == "packed" and data.layout != "single"', True),
        ("model.window or not model.window", True),
        ("not (parameters == 1 or parameters / 2 == 1)", True),
        ("data.lengths == data.lengths", True),
    ],
)
def test_checks_mean_what_python_means(text, holds):
    if holds is None:
        with pytest.raises(ExpressionError, match="no number"):
            language.parse(text).check(lookup)
    else:
        assert language.parse(text).check(lookup).holds is holds


def test_a_verdict_names_what_was_measured():
    verdict = language.parse('parameters > 1 and accuracy["12"].low > 0.5').check(lookup)
    measured = {"parameters": 793_600, 'accuracy["12"].low': 0.25}
    assert verdict == language.Verdict(False, measured)


def test_what_is_not_known_is_neither_kept_nor_broken_and_what_cannot_be_is_broken():
    unknown = language.parse("parameters > 1 and later > 1").check(lookup)
    assert (unknown.holds, unknown.reason) == (None, "not measured yet")
    # What is known to be broken is so whatever the rest may be.
    assert language.parse("parameters < 1 and later > 1").check(lookup).holds is False
    impossible = language.parse("never > 1").check(lookup)
    assert (impossible.holds, impossible.reason) == (False, "does not compile")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sign", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("check", ["loss {} 1", "not 1 {} loss", "max(loss, 0) {} 1"])
def test_what_is_not_finite_keeps_no_invariant(value, sign, check):
    with pytest.raises(ExpressionError, match="a number beyond"):
        language.parse(check.format(sign)).check(lambda path: value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os').system('true')", ["column 1", "Call", "not allowed"]),
        ("1 < 2 and open('x') == 1", ["column 11", "a call of open"]),
        ("(lambda: 1)() == 1", ["Call"]),
        ("[x for x in y] == 1", ["ListComp"]),
        ("2 ** 9 < 3", ["Pow"]),
        ("1 << 9 < 3", ["LShift"]),
        ("parameters in (1, 2)", ["In"]),
        ("a.b(1) < 2", ["Call"]),
        ("data['x' + 'y'] < 1", ["name of a metric"]),
        ("data[data] < 1", ["name of a metric"]),
        ("(1).real < 2", ["name of a metric"]),
        ("1e999 > 1", ["1e+30"]),
        ("f'{x}' == 'a'", ["JoinedStr"]),
        ("(y := 3) < 4", ["NamedExpr"]),
        ("max(*data.lengths) < 3", ["Starred"]),
        ("max(data.lengths, key=len) < 3", ["Call"]),
        ("b'x' == 1", ["neither number"]),
        ("... == 1", ["neither number"]),
        ("parameters <=", ["no expression"]),
        ("", ["no expression"]),
        ("a\0b", ["no expression"]),
        ("(" * 300, ["no expression"]),
        ("not " * 60 + "True", ["30 deep"]),
        ("1" * 501, ["501 characters", "500"]),
        ("parameters", ["states nothing", "793600"]),
        ("parameters / 0 < 1", ["divides by zero"]),
        ("data.lengths < 3", ["column 1", "no number"]),
        ("data.layout + 1 < 3", ["'packed' is no number"]),
        ("data.layout == 3", ["compares 'packed' with 3"]),
        ("len(parameters) == 1", ["no list"]),
        ("parameters and True", ["neither holds nor not"]),
        ("model.window < 1", ["False is no number"]),
        ("params < 1", ["no metric params"]),
    ],
)
def test_anything_else_is_refused_with_what_and_where(text, said):
    with pytest.raises(ExpressionError) as refused:
        language.parse(text).check(lookup)
    for words in said:
        assert words in str(refused.value)


def test_metrics_are_listed_without_the_names_of_functions():
    check = language.parse('max(data.lengths) < parameters + accuracy["12"].low and parameters > 1')
    assert check.metrics() == [("data", "lengths"), ("parameters",), ("accuracy", "12", "low")]


WORDS = st.sampled_from(
    [*"()[]{}.,:<>=!+-*/%@'\"", "**", "//", "<=", "==", "and ", "or ", "not ", "in ", "is ", "if ",
     "else ", "lambda ", "max", "len", "open", "__class__", "parameters", "data", "lengths",
     "1", "9e99", "'x'", "True", " "]
)  # fmt: skip


@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=25).map("".join)))
def test_any_text_gives_a_verdict_or_the_one_documented_error(text):
    try:
        verdict = language.parse(text).check(lookup)
    except ExpressionError:
        return
    assert verdict.holds in (True, False, None)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["<", "<=", "==", "!=", ">"]))
def test_comparisons_agree_with_python(a, b, sign):
    assert language.parse(f"{a} {sign} {b}").check(lookup).holds is eval(f"{a} {sign} {b}")

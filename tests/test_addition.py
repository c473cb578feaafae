"""The task on arrays against its twins on strings, and the data law against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from spak_jax import addition
from spak_jax.config import Data

SEED_LAW = Data()

# Numbers of every length up to 30 digits alike, with the long carry chains that chance avoids.
numbers = st.integers(1, 30).flatmap(
    lambda digits: st.one_of(
        st.integers(0, 10**digits - 1),
        st.sampled_from([0, 1, 10**digits - 1, 10 ** (digits - 1)]),
    )
)
# Always as many, one of them with 30 digits: arrays of one shape, compiled once.
pairs = st.lists(st.tuples(numbers, numbers), min_size=8, max_size=8).map(
    lambda drawn: [(10**30 - 1, 10**29), *drawn]
)
render = jax.jit(addition.render, static_argnums=1)
carries = jax.jit(addition.carries)


def texts_of(problems: addition.Problems) -> list[str]:
    """The problems as plain-Python texts, by their digits alone."""
    integer = lambda digits: int("".join(str(d) for d in reversed(digits.tolist())))  # noqa: E731
    a, b = np.asarray(problems.a), np.asarray(problems.b)
    flat = lambda array: array.reshape(-1, array.shape[-1])  # noqa: E731
    return [
        addition.problem_text(integer(x), integer(y)) for x, y in zip(flat(a), flat(b), strict=True)
    ]


def test_vocabulary_is_the_originals():
    assert addition.encode("\n+0123456789=") == list(range(13))
    assert addition.decode(addition.encode("321+654=975\n")) == "321+654=975\n"


def test_text_is_reversed_and_unpadded():
    assert addition.problem_text(123, 456) == "321+654=975\n"
    assert addition.problem_text(0, 10) == "0+01=01\n"


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_render_equals_text(operands):
    problems = addition.problems_from_integers(operands)
    tokens, answer = map(np.asarray, render(problems, 96))
    for row, mask, (a, b) in zip(tokens, answer, operands, strict=True):
        text = addition.problem_text(a, b)
        assert addition.decode(row) == text.ljust(96, "\n")
        expected = addition.answer_mask(text)
        assert mask.tolist() == expected + [False] * (96 - len(text))


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_carries_and_lengths_equal_integers(operands):
    problems = addition.problems_from_integers(operands)
    assert carries(problems).tolist() == [addition.count_carries(a, b) for a, b in operands]
    assert addition.longer_operand(problems).tolist() == [
        max(len(str(a)), len(str(b))) for a, b in operands
    ]


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_count_carries_by_hand(a, b):
    carry = count = 0
    for place in range(31):
        carry = (a // 10**place % 10 + b // 10**place % 10 + carry) // 10
        count += carry
    assert addition.count_carries(a, b) == count


@pytest.mark.parametrize("digits", [1, 2, 5, 12, 30])
def test_exact_problems_have_exactly_that_length(digits):
    problems = addition.sample_exact(jax.random.key(digits), digits, 500)
    for text in texts_of(problems):
        a, b = text.partition("=")[0].split("+")
        assert len(a) == len(b) == digits
    firsts = np.concatenate([problems.a[:, -1], problems.b[:, -1]])
    possible = range(10) if digits == 1 else range(1, 10)
    assert set(firsts.tolist()) == set(possible)
    assert chisquare(np.bincount(firsts, minlength=10)[list(possible)]).pvalue > 1e-4


def test_operand_lengths_follow_the_law():
    """P(length l | at most m) = sum over d of 1/m times the share of numbers below 10^d."""
    m, count = 4, 40_000
    _, lengths = addition.sample_operands(jax.random.key(0), jnp.full(count, m), 6)
    share = lambda length, d: (  # noqa: E731
        (10**length - (10 ** (length - 1) if length > 1 else 0)) / 10**d if length <= d else 0
    )
    expected = [sum(share(n, d) for d in range(1, m + 1)) / m for n in range(1, m + 1)]
    observed = np.bincount(np.asarray(lengths), minlength=m + 1)[1:]
    assert chisquare(observed, np.array(expected) * count).pvalue > 1e-4


def test_longest_operands_match_the_published_validation_file():
    """The original's 20,000 validation problems, by the digits of their longest operand."""
    published = np.array([1251, 3554, 5496, 7165, 1745, 789])
    problems = addition.sample_law(jax.random.key(1), SEED_LAW, (400_000,))
    ours = np.bincount(np.asarray(addition.longer_operand(problems)), minlength=7)[1:]
    assert chisquare(published, ours / ours.sum() * published.sum()).pvalue > 1e-3


@pytest.mark.parametrize("examples", [0, 9_000])
@pytest.mark.parametrize("layout", ["packed", "single"])
def test_training_never_shows_a_longer_operand(layout, examples):
    data = Data(layout=layout, examples=examples)
    supply = addition.fixed_supply(data)[0] if examples else None
    batch = addition.training_batch(jax.random.key(2), data, 256, supply)
    text = "".join(addition.decode(row) + "|" for row in np.asarray(batch.tokens))
    operands = [
        number
        for problem in text.replace("|", "\n").split("\n")
        for number in problem.partition("=")[0].split("+")
    ]
    assert max(map(len, operands)) == data.longest == 6


@pytest.mark.parametrize("examples", [0, 9_000])
def test_packed_rows_are_texts_one_after_another(examples):
    data = Data(examples=examples)
    supply = addition.fixed_supply(data)[0] if examples else None
    batch = addition.training_batch(jax.random.key(3), data, 64, supply)
    known = "".join(texts_of(supply)) if examples else None
    for tokens, targets, answer in zip(*map(np.asarray, batch), strict=True):
        text = addition.decode([*tokens, targets[-1]])
        assert len(text) == 65
        *whole, cut = text.split("\n")
        for problem in whole:
            a, rest = problem.split("+")
            b, total = rest.split("=")
            assert f"{problem}\n" == addition.problem_text(int(a[::-1]), int(b[::-1]))
        assert answer.tolist() == addition.answer_mask(text)[1:]
        assert targets.tolist() == addition.encode(text)[1:]
        if known:
            # In the order of the set: a row is a piece of the file, from a problem's start.
            assert ("\n" + text) in ("\n" + known + known[:200])
    assert batch.tokens.shape == (64, 64)
    assert cut is not None


def test_single_rows_hold_one_problem_and_padding():
    data = Data(layout="single", row_length=24, examples=0)
    batch = addition.training_batch(jax.random.key(4), data, 64, None)
    for tokens, targets, answer in zip(*map(np.asarray, batch), strict=True):
        text = addition.decode([*tokens, targets[-1]])
        problem = text.partition("\n")[0]
        assert text == problem.ljust(25, "\n")
        assert answer.sum() == len(problem.partition("=")[2]) + 1


def test_fixed_supply_is_the_configurations_and_held_out_apart():
    data = Data(examples=9_000, seed=5)
    training, held_out = addition.fixed_supply(data)
    again, _ = addition.fixed_supply(data)
    other, _ = addition.fixed_supply(data.model_copy(update={"seed": 6}))
    assert (len(training.a), len(held_out.a)) == (9_000, 1_000)
    assert (training.a == again.a).all()
    assert (training.a != other.a).any()
    assert texts_of(training)[:1000] != texts_of(held_out)


def test_batches_depend_on_the_key_alone():
    data = Data(examples=0)
    make = jax.jit(lambda key: addition.training_batch(key, data, 8, None))
    first, second = make(jax.random.key(0)), make(jax.random.key(0))
    assert (first.tokens == second.tokens).all()
    assert (first.tokens != make(jax.random.key(1)).tokens).any()


def test_from_equals_on_marks_each_answer_of_a_row():
    text = "1+2=3\n9+9=81\n4+"
    marked = addition.from_equals_on(jnp.array([addition.encode(text)]))[0]
    # From an `=` up to, not including, the newline that ends the answer.
    assert marked.tolist() == [c == "^" for c in "   ^^    ^^^   "]


def test_seed_columns_are_drawn_by_its_law():
    problems = addition.sample_seed_columns(jax.random.key(0), 50_000)
    longer = np.asarray(addition.longer_operand(problems))
    assert longer.max() == 12
    # Its fixed draw of 500 fell into these columns.
    published = {"1-4": 48, "5-6": 105, "8": 116, "10": 151, "12": 80}
    ours = [
        ((longer >= low) & (longer <= high)).sum() for low, high in addition.SEED_COLUMNS.values()
    ]
    assert sum(ours) == 50_000
    assert chisquare(list(published.values()), np.array(ours) / 100).pvalue > 1e-3


@pytest.mark.parametrize(
    ("text", "expected"), [("123+456", (123, 456)), ("0+0=0", (0, 0)), ("9" * 100 + "+1", None)]
)
def test_parse_problem(text, expected):
    expected = expected or (10**100 - 1, 1)
    assert addition.parse_problem(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "1+",
        "+1",
        "a+b",
        "-1+2",
        "1+2+3",
        "1 + 2",
        "1+2=4",
        "01+2",
        "1+2=",
        "1+2=03",
        "1" * 101 + "+1",
        "1" * 5000 + "+1",
        "\u0661+1",
        "1+1\n",
    ],
)
def test_parse_problem_refuses(text):
    with pytest.raises(ValueError):
        addition.parse_problem(text)

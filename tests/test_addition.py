"""The task on arrays against its twins on strings, and the data law against its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from spak_jax import addition
from spak_jax.config import OPERANDS, Data

SEED_LAW = Data()

TASKS = list(OPERANDS)
# Numbers of every length up to 30 digits alike, with the long carry chains that chance avoids.
numbers = st.integers(1, 30).flatmap(
    lambda digits: st.one_of(
        st.integers(0, 10**digits - 1),
        st.sampled_from([0, 1, 10**digits - 1, 10 ** (digits - 1)]),
    )
)


def ordered(task: str, operands: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(operands, reverse=True)) if task == "subtraction" else operands


def problems_of(task: str):
    """Always as many, one of them with 30 digits: arrays of one shape, compiled once."""
    longest = (10**30 - 1, 10**29, 1)[: OPERANDS[task]]
    one = st.tuples(*[numbers] * OPERANDS[task]).map(lambda operands: ordered(task, operands))
    return st.lists(one, min_size=8, max_size=8).map(lambda drawn: [longest, *drawn])


problems_of_any_task = st.sampled_from(TASKS).flatmap(
    lambda task: st.tuples(st.just(task), problems_of(task))
)
render = jax.jit(addition.render, static_argnums=(1, 2))
carries = jax.jit(addition.carries, static_argnums=1)
coupled_ids = jax.jit(addition.coupled_ids)


def texts_of(problems: addition.Problems, task: str = "addition") -> list[str]:
    """The problems as plain-Python texts, by their digits alone."""
    integer = lambda digits: int("".join(str(d) for d in reversed(digits.tolist())))  # noqa: E731
    flat = np.asarray(problems.numbers).reshape(-1, *problems.numbers.shape[-2:])
    return [addition.problem_text(list(map(integer, numbers)), task) for numbers in flat]


def decoded(row, task: str = "addition") -> str:
    return addition.decode(row).replace("+", addition.symbol(task))


def test_vocabulary_is_the_originals():
    assert addition.encode("\n+0123456789=") == list(range(13))
    assert addition.decode(addition.encode("321+654=975\n")) == "321+654=975\n"


def test_text_is_reversed_and_unpadded():
    assert addition.problem_text((123, 456)) == "321+654=975\n"
    assert addition.problem_text((0, 10)) == "0+01=01\n"
    assert addition.problem_text((123, 4, 90), "three-operands") == "321+4+09=712\n"
    assert addition.problem_text((123, 121), "subtraction") == "321-121=200\n"


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_render_equals_text(drawn):
    task, operands = drawn
    problems = addition.problems_from_integers(operands)
    tokens, answer = map(np.asarray, render(problems, 127, task))
    for row, mask, numbers in zip(tokens, answer, operands, strict=True):
        text = addition.problem_text(numbers, task)
        assert decoded(row, task) == text.ljust(127, "\n")
        expected = addition.answer_mask(text)
        assert mask.tolist() == expected + [False] * (127 - len(text))


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_carries_and_lengths_equal_integers(drawn):
    task, operands = drawn
    problems = addition.problems_from_integers(operands)
    assert carries(problems, task).tolist() == [addition.count_carries(x, task) for x in operands]
    longest = addition.longest_operand(problems).tolist()
    assert longest == [max(len(str(number)) for number in numbers) for numbers in operands]


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_count_carries_by_sums_of_digits(a, b):
    """Each carry takes 9 from the sum of the digits; each borrow of a difference adds 9."""
    digit_sum = lambda number: sum(map(int, str(number)))  # noqa: E731
    count = addition.count_carries((a, b))
    assert digit_sum(a + b) == digit_sum(a) + digit_sum(b) - 9 * count
    a, b = max(a, b), min(a, b)
    count = addition.count_carries((a, b), "subtraction")
    assert digit_sum(a - b) == digit_sum(a) - digit_sum(b) + 9 * count


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_coupled_ids_say_which_digits_belong_together(drawn):
    task, operands = drawn
    tokens = render(addition.problems_from_integers(operands), 127, task)[0]
    for row, ids in zip(np.asarray(tokens), np.asarray(coupled_ids(tokens)), strict=True):
        text, expected = addition.decode(row), []
        for part in re.split("([+=\n])", text)[:-1]:
            if part.isdecimal():
                expected += range(2, 2 + len(part))
            elif part:
                expected.append(1 if part == "=" else 0)
        assert ids.tolist() == expected


@pytest.mark.parametrize("digits", [1, 2, 3, 12, 40])
@pytest.mark.parametrize("kind", addition.KINDS)
def test_kinds_are_what_they_say(kind, digits):
    problems = addition.sample_kind(np.random.default_rng(digits), kind, digits, 60)
    lengths = np.asarray(problems.lengths)
    assert (lengths.max(-1) == digits).all()
    found = np.asarray(carries(problems, "addition"))
    wide = addition.widened(problems, 50)
    assert (carries(wide, "addition") == found).all()
    pairs = zip(render(wide, 127, "addition"), render(problems, 127, "addition"), strict=True)
    for array, same in pairs:
        assert (array == same).all()
    if kind == "nines":
        assert texts_of(problems)[:2] == [
            addition.problem_text(pair) for pair in [(10**digits - 1, 1), (1, 10**digits - 1)]
        ]
    if kind in ("nines", "all-carry"):
        assert (found == digits).all()
    if kind == "no-carry":
        assert (found == 0).all()
    if kind in ("all-carry", "no-carry"):
        assert (lengths == digits).all()
    if kind == "lopsided":
        assert lengths.min(-1).max() == min(3, digits)
    texts = texts_of(problems)
    # Both orders, and no two alike where chance has room.
    assert digits < 12 or kind == "nines" or len(set(texts)) == 60
    tokens = np.asarray(render(problems, 127, "addition")[0])
    assert [addition.decode(row).rstrip("\n") + "\n" for row in tokens] == texts


@pytest.mark.parametrize("task", TASKS)
def test_every_task_draws_what_it_can_do(task):
    data = Data(task=task, row_length=64)
    drawn = [
        addition.sample_exact(jax.random.key(0), 3, 300, task),
        addition.sample_law(jax.random.key(1), data, (300,)),
        addition.sample_seed_columns(jax.random.key(2), 300, task),
    ]
    for problems in drawn:
        assert problems.numbers.shape[-2] == OPERANDS[task]
        width = addition.text_length(problems.digits, task)
        tokens = np.asarray(render(problems, width, task)[0])
        for row, text in zip(tokens, texts_of(problems, task), strict=True):
            assert decoded(row, task) == text.ljust(width, "\n")
            # Subtraction would raise for a negative answer, which is no text of the vocabulary.
            assert addition.parse_problem(_forwards(text, task), task)


def _forwards(text: str, task: str) -> str:
    return addition.symbol(task).join(
        part[::-1] for part in text.partition("=")[0].split(addition.symbol(task))
    )


@pytest.mark.parametrize("digits", [1, 2, 5, 12, 30])
def test_exact_problems_have_exactly_that_length(digits):
    problems = addition.sample_exact(jax.random.key(digits), digits, 500)
    for text in texts_of(problems):
        a, b = text.partition("=")[0].split("+")
        assert len(a) == len(b) == digits
    firsts = np.asarray(problems.numbers[:, :, -1]).ravel()
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
    ours = np.bincount(np.asarray(addition.longest_operand(problems)), minlength=7)[1:]
    assert chisquare(published, ours / ours.sum() * published.sum()).pvalue > 1e-3


@pytest.mark.parametrize("examples", [0, 9_000])
@pytest.mark.parametrize("layout", ["packed", "single"])
@pytest.mark.parametrize("task", TASKS)
def test_training_never_shows_a_longer_operand(task, layout, examples):
    data = Data(task=task, layout=layout, examples=examples)
    supply = addition.fixed_supply(data)[0] if examples else None
    batch = addition.training_batch(jax.random.key(2), data, 256, supply)
    text = "".join(addition.decode(row) + "|" for row in np.asarray(batch.tokens))
    operands = [
        number
        for problem in text.replace("|", "\n").split("\n")
        for number in problem.partition("=")[0].split("+")
    ]
    answers = [problem.partition("=")[2] for problem in text.replace("|", "\n").split("\n")]
    assert max(map(len, answers)) <= 7
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
            assert f"{problem}\n" == addition.problem_text((int(a[::-1]), int(b[::-1])))
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
    assert (training.count, held_out.count) == (9_000, 1_000)
    assert (training.numbers == again.numbers).all()
    assert (training.numbers != other.numbers).any()
    assert texts_of(training)[:1000] != texts_of(held_out)


@pytest.mark.parametrize("layout", ["packed", "single"])
def test_rows_of_a_fixed_set_start_anywhere_in_it(layout):
    """Each of 90 problems is the first of some of 2,000 rows."""
    data = Data(examples=90, layout=layout, row_length=32)
    supply, _ = addition.fixed_supply(data)
    batch = addition.training_batch(jax.random.key(7), data, 2_000, supply)
    first = {addition.decode(row).partition("\n")[0] for row in np.asarray(batch.tokens)}
    assert {text.rstrip() for text in texts_of(supply)} == first


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
    longer = np.asarray(addition.longest_operand(problems))
    assert longer.max() == 12
    # Its fixed draw of 500 fell into these columns.
    published = {"1-4": 48, "5-6": 105, "8": 116, "10": 151, "12": 80}
    ours = [
        ((longer >= low) & (longer <= high)).sum() for low, high in addition.SEED_COLUMNS.values()
    ]
    assert sum(ours) == 50_000
    assert chisquare(list(published.values()), np.array(ours) / 100).pvalue > 1e-3


@pytest.mark.parametrize(
    ("text", "task", "expected"),
    [
        ("123+456", "addition", (123, 456)),
        ("0+0=0", "addition", (0, 0)),
        ("9" * 5000 + "+1", "addition", (10**5000 - 1, 1)),
        ("1+2+3=6", "three-operands", (1, 2, 3)),
        ("100-99=001", "subtraction", (100, 99)),
    ],
)
def test_parse_problem(text, task, expected):
    assert addition.parse_problem(text, task) == expected


@pytest.mark.parametrize(
    ("text", "task"),
    [
        *(
            (text, "addition")
            for text in [
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
                "1" * 10_001 + "+1",
                "1+" + "1" * 50_000,
                "\u0661+1",
                "1+1\n",
                "2-1",
            ]
        ),
        ("1-2", "subtraction"),
        ("2+1", "subtraction"),
        ("100-99=1", "subtraction"),
        ("1+2", "three-operands"),
        ("1+2+3=5", "three-operands"),
    ],
)
def test_parse_problem_refuses(text, task):
    with pytest.raises(ValueError):
        addition.parse_problem(text, task)

"""The task on arrays against its twins on strings; drawn lengths against their distribution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_turn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from spak_jax import tasks
from spak_jax.config_sections import MAX_LENGTH, Data
from spak_jax.data import make_dataset, sample_published_columns, sample_training, training_batch
from spak_jax.registry import TASKS as REGISTRY
from spak_jax.tasks import Problems, Task

BASELINE_DATA = Data()

TASKS = {name: REGISTRY.get(name)() for name in ("addition", "three-operands", "subtraction")}
ADDITION = TASKS["addition"]
# Numbers of every length up to 30 digits alike, with the long carry chains that chance avoids.
numbers = st.integers(1, 30).flatmap(
    lambda digits: st.one_of(
        st.integers(0, 10**digits - 1),
        st.sampled_from([0, 1, 10**digits - 1, 10 ** (digits - 1)]),
    )
)


def written(*operands: int) -> tuple[str, ...]:
    return tuple(map(str, operands))


def ordered(task: Task, operands: tuple[int, ...]) -> tuple[str, ...]:
    subtracts = task.name == "subtraction"
    return written(*(sorted(operands, reverse=True) if subtracts else operands))


def problems_of(task: Task):
    """Always as many, one of them with 30 digits: arrays of one shape, compiled once."""
    longest = written(10**30 - 1, 10**29, 1)[: task.inputs]
    one = st.tuples(*[numbers] * task.inputs).map(lambda operands: ordered(task, operands))
    return st.lists(one, min_size=8, max_size=8).map(lambda drawn: [longest, *drawn])


problems_of_any_task = st.sampled_from(list(TASKS.values())).flatmap(
    lambda task: st.tuples(st.just(task), problems_of(task))
)
render = jax.jit(
    lambda problems, length, task: task.render(problems, length), static_argnums=(1, 2)
)
carries = jax.jit(lambda problems, task: task.carries(problems), static_argnums=1)
depths = jax.jit(lambda problems, task: task.depths(problems), static_argnums=1)
position_ids = jax.jit(lambda tokens, task: task.position_ids(tokens), static_argnums=1)
drawn_for_training = jax.jit(sample_training, static_argnums=(1, 2))
dataset_of = jax.jit(make_dataset, static_argnums=0)
batch_of = jax.jit(training_batch, static_argnums=(1, 2))


def lengths_of(problems: Problems, task: Task = ADDITION) -> np.ndarray:
    return task.lengths(Problems(*map(np.asarray, problems)))


def texts_of(problems: Problems, task: Task = ADDITION) -> list[str]:
    """The problems as plain-Python texts, by their digits alone."""
    integer = lambda digits: int("".join(str(d) for d in reversed(digits.tolist())))  # noqa: E731
    flat = np.asarray(problems.inputs).reshape(-1, *problems.inputs.shape[-2:])
    return [task.text(written(*map(integer, inputs))) for inputs in flat]


def test_vocabulary_is_the_originals():
    assert ADDITION.encode("\n+0123456789=") == list(range(13))
    assert ADDITION.decode(ADDITION.encode("321+654=975\n")) == "321+654=975\n"
    assert TASKS["subtraction"].encode("\n-0123456789=") == list(range(13))


def answer_mask(text: str) -> list[bool]:
    """Which characters of whole problems belong to an answer, newlines included."""
    mask, inside = [], False
    for letter in text:
        mask.append(inside)
        if letter in "=\n":
            inside = letter == "="
    return mask


def test_text_is_reversed_and_unpadded():
    assert ADDITION.text(("123", "456")) == "321+654=975\n"
    assert ADDITION.text(("0", "10")) == "0+01=01\n"
    assert TASKS["three-operands"].text(("123", "4", "90")) == "321+4+09=712\n"
    assert TASKS["subtraction"].text(("123", "121")) == "321-121=200\n"


@given(problems_of_any_task)
def test_the_plain_answer_is_that_of_integers(drawn):
    task, problems = drawn
    for problem in problems:
        first, *others = map(int, problem)
        answer = task.solve(problem)
        if task.name == "subtraction":
            assert int(answer) == first - sum(others) and len(answer) == len(problem[0])
        else:
            assert answer == str(first + sum(others))


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_render_equals_text(drawn):
    task, operands = drawn
    problems = task.arrays(operands)
    tokens, answer = map(np.asarray, render(problems, 127, task))
    for row, mask, problem in zip(tokens, answer, operands, strict=True):
        text = task.text(problem)
        assert task.decode(row) == text.ljust(127, "\n")
        expected = answer_mask(text)
        assert mask.tolist() == expected + [False] * (127 - len(text))


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_carries_and_lengths_equal_integers(drawn):
    task, operands = drawn
    problems = task.arrays(operands)
    assert carries(problems, task).tolist() == [task.count_carries(x) for x in operands]
    assert task.lengths(problems).tolist() == list(map(task.length, operands))


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_count_carries_by_sums_of_digits(a, b):
    """Each carry takes 9 from the sum of the digits; each borrow of a difference adds 9."""
    digit_sum = lambda number: sum(map(int, str(number)))  # noqa: E731
    count = ADDITION.count_carries(written(a, b))
    assert digit_sum(a + b) == digit_sum(a) + digit_sum(b) - 9 * count
    a, b = max(a, b), min(a, b)
    count = TASKS["subtraction"].count_carries(written(a, b))
    assert digit_sum(a - b) == digit_sum(a) - digit_sum(b) + 9 * count


def ripple_rounds(task: Task, problem: tuple[str, ...]) -> int:
    """Rounds until no carry changes, where all places carry at once what they know of."""
    width = max(map(len, problem))
    first, *others = ([int(digit) for digit in number.zfill(width)[::-1]] for number in problem)
    sums = [a + task.sign * sum(more) for a, *more in zip(first, *others, strict=True)]
    rounds, come_in, known = 0, [0] * (width + 1), []
    while come_in != known:
        rounds, known = rounds + 1, come_in
        come_in = [0, *((s + c) // 10 for s, c in zip(sums, known[:-1], strict=True))]
    return rounds - 1


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_depths_are_the_rounds_that_carries_take(drawn):
    task, operands = drawn
    problems = task.arrays(operands)
    expected = [ripple_rounds(task, problem) for problem in operands]
    assert depths(problems, task).tolist() == task.depths(problems).tolist() == expected


@pytest.mark.parametrize(
    ("task", "problem", "depth"),
    [
        ("addition", ("999", "1"), 3),
        ("addition", ("999", "0"), 0),
        ("addition", ("555", "555"), 1),
        ("addition", ("945", "55"), 3),
        ("subtraction", ("1000", "1"), 3),
        ("subtraction", ("456", "123"), 0),
        ("three-operands", ("99", "89", "21"), 2),
        ("three-operands", ("9", "9", "9"), 1),
        ("three-operands", ("995", "95", "10"), 2),
        ("three-operands", ("995", "995", "10"), 3),
    ],
)
def test_how_far_a_carry_is_handed_on(task, problem, depth):
    problems = TASKS[task].arrays([problem])
    assert TASKS[task].depths(problems).tolist() == [ripple_rounds(TASKS[task], problem)] == [depth]


@settings(deadline=None, max_examples=60)
@given(problems_of_any_task)
def test_coupled_ids_say_which_digits_belong_together(drawn):
    task, operands = drawn
    tokens = render(task.arrays(operands), 127, task)[0]
    for row, ids in zip(np.asarray(tokens), np.asarray(position_ids(tokens, task)), strict=True):
        text, expected = task.decode(row), []
        for part in re.split("([-+=\n])", text)[:-1]:
            if part.isdecimal():
                expected += range(2, 2 + len(part))
            elif part:
                expected.append(1 if part == "=" else 0)
        assert ids.tolist() == expected


@pytest.mark.parametrize("digits", [1, 2, 3, 12, 40])
@pytest.mark.parametrize("kind", ADDITION.kinds)
def test_kinds_are_what_they_say(kind, digits):
    problems = ADDITION.sample_kind(np.random.default_rng(digits), kind, digits, 60)
    lengths = np.asarray(problems.lengths)
    assert (lengths.max(-1) == digits).all()
    found = np.asarray(carries(problems, ADDITION))
    wide = ADDITION.pad(problems, 50)
    assert (np.asarray(carries(wide, ADDITION)) == found).all()
    pairs = zip(render(wide, 127, ADDITION), render(problems, 127, ADDITION), strict=True)
    for array, same in pairs:
        np.testing.assert_array_equal(array, same)
    if kind == "nines":
        assert texts_of(problems)[:2] == [
            ADDITION.text(written(*pair)) for pair in [(10**digits - 1, 1), (1, 10**digits - 1)]
        ]
    if kind in ("nines", "all-carry", "chains"):
        assert (found == digits).all()
    if kind in ("nines", "chains"):
        # One carry goes through all places.
        assert (np.asarray(depths(problems, ADDITION)) == digits).all()
    if kind == "no-carry":
        assert (found == 0).all()
    if kind in ("all-carry", "no-carry", "chains"):
        assert (lengths == digits).all()
    if kind == "lopsided":
        assert lengths.min(-1).max() == min(3, digits)
    texts = texts_of(problems)
    # Both orders, and no two alike where chance has room.
    assert digits < 12 or kind == "nines" or len(set(texts)) == 60
    tokens = np.asarray(render(problems, 127, ADDITION)[0])
    assert [ADDITION.decode(row).rstrip("\n") + "\n" for row in tokens] == texts


@pytest.mark.parametrize("name", TASKS)
def test_every_task_draws_what_it_can_do(name):
    data = Data(task=name, row_length=64)
    task = tasks.of(data)
    drawn = [
        task.sample_exact(jax.random.key(0), 3, 300),
        drawn_for_training(jax.random.key(1), data, (300,)),
        sample_published_columns(jax.random.key(2), 300, task),
    ]
    for problems in drawn:
        assert problems.inputs.shape[-2] == task.inputs
        width = task.text_length(problems.width)
        tokens = np.asarray(render(problems, width, task)[0])
        for row, text in zip(tokens, texts_of(problems, task), strict=True):
            assert task.decode(row) == text.ljust(width, "\n")
            # No difference is negative.
            inputs = text.partition("=")[0].split(task.operator)
            assert task.parse(task.format([each[::-1] for each in inputs]), MAX_LENGTH)


@pytest.mark.parametrize("digits", [1, 2, 5, 12, 30])
def test_exact_problems_have_exactly_that_length(digits):
    problems = ADDITION.sample_exact(jax.random.key(digits), digits, 500)
    for text in texts_of(problems):
        a, b = text.partition("=")[0].split("+")
        assert len(a) == len(b) == digits
    firsts = np.asarray(problems.inputs[:, :, -1]).ravel()
    possible = range(10) if digits == 1 else range(1, 10)
    assert set(firsts.tolist()) == set(possible)
    assert chisquare(np.bincount(firsts, minlength=10)[list(possible)]).pvalue > 1e-4


def test_operand_lengths_follow_their_distribution():
    """P(length l | at most m) = sum over d of 1/m times the share of numbers below 10^d."""
    m, count = 4, 40_000
    draw = jax.jit(ADDITION.sample_input, static_argnums=2)
    _, lengths = draw(jax.random.key(0), np.full(count, m), 6)
    share = lambda length, d: (  # noqa: E731
        (10**length - (10 ** (length - 1) if length > 1 else 0)) / 10**d if length <= d else 0
    )
    expected = [sum(share(n, d) for d in range(1, m + 1)) / m for n in range(1, m + 1)]
    observed = np.bincount(np.asarray(lengths), minlength=m + 1)[1:]
    assert chisquare(observed, np.array(expected) * count).pvalue > 1e-4


def test_longest_operands_match_the_published_validation_file():
    """The original's 20,000 validation problems, by the digits of their longest operand."""
    published = np.array([1251, 3554, 5496, 7165, 1745, 789])
    problems = drawn_for_training(jax.random.key(1), BASELINE_DATA, (400_000,))
    ours = np.bincount(lengths_of(problems), minlength=7)[1:]
    assert chisquare(published, ours / ours.sum() * published.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("rows", "name"),
    in_turn([("packed", 0), ("packed", 9_000), ("single", 0), ("single", 9_000)], list(TASKS)),
)
def test_training_never_shows_a_longer_input(rows, name):
    task, (layout, examples) = TASKS[name], rows
    data = Data(task=name, layout=layout, examples=examples)
    fixed = dataset_of(data).training
    batch = batch_of(jax.random.key(2), data, 256, fixed)
    text = "".join(task.decode(row) + "|" for row in np.asarray(batch.tokens))
    operands = [
        number
        for problem in text.replace("|", "\n").split("\n")
        for number in problem.partition("=")[0].split(task.operator)
    ]
    answers = [problem.partition("=")[2] for problem in text.replace("|", "\n").split("\n")]
    assert max(map(len, answers)) <= 7
    assert max(map(len, operands)) == data.longest == 6


@pytest.mark.parametrize("examples", [0, 9_000])
def test_packed_rows_are_texts_one_after_another(examples):
    data = Data(examples=examples)
    fixed = dataset_of(data).training
    batch = batch_of(jax.random.key(3), data, 64, fixed)
    known = "".join(texts_of(fixed)) if examples else None
    for tokens, targets, answer in zip(*map(np.asarray, batch), strict=True):
        text = ADDITION.decode([*tokens, targets[-1]])
        assert len(text) == 65
        *whole, cut = text.split("\n")
        for problem in whole:
            a, rest = problem.split("+")
            b, total = rest.split("=")
            assert f"{problem}\n" == ADDITION.text((a[::-1], b[::-1]))
        assert answer.tolist() == answer_mask(text)[1:]
        assert targets.tolist() == ADDITION.encode(text)[1:]
        if known:
            # In the order of the set: a row is a piece of the file, from a problem's start.
            assert ("\n" + text) in ("\n" + known + known[:200])
    assert batch.tokens.shape == (64, 64)
    assert cut is not None


def test_single_rows_hold_one_problem_and_padding():
    data = Data(layout="single", row_length=24, examples=0)
    batch = batch_of(jax.random.key(4), data, 64, None)
    for tokens, targets, answer in zip(*map(np.asarray, batch), strict=True):
        text = ADDITION.decode([*tokens, targets[-1]])
        problem = text.partition("\n")[0]
        assert text == problem.ljust(25, "\n")
        assert answer.sum() == len(problem.partition("=")[2]) + 1


def test_the_fixed_dataset_is_the_configurations_and_held_out_apart():
    data = Data(examples=9_000, seed=5)
    training, held_out = dataset_of(data)
    again, _ = jax.jit(lambda: make_dataset(data))()
    other, _ = dataset_of(data.model_copy(update={"seed": 6}))
    assert (training.count, held_out.count) == (9_000, 1_000)
    inputs, same, others = (np.asarray(each.inputs) for each in (training, again, other))
    assert (inputs == same).all() and (inputs != others).any()
    assert texts_of(training)[:1000] != texts_of(held_out)


@pytest.mark.parametrize("layout", ["packed", "single"])
def test_rows_of_a_fixed_set_start_anywhere_in_it(layout):
    """Each of 90 problems is the first of some of 2,000 rows."""
    data = Data(examples=90, layout=layout, row_length=32)
    fixed, _ = dataset_of(data)
    batch = batch_of(jax.random.key(7), data, 2_000, fixed)
    first = {ADDITION.decode(row).partition("\n")[0] for row in np.asarray(batch.tokens)}
    assert {text.rstrip() for text in texts_of(fixed)} == first


def test_batches_depend_on_the_key_alone():
    data = Data(examples=0)
    first, second, other = (
        np.asarray(batch_of(jax.random.key(i), data, 8, None).tokens) for i in (0, 0, 1)
    )
    assert (first == second).all() and (first != other).any()


def test_answering_marks_each_answer_of_a_row():
    text = "1+2=3\n9+9=81\n4+"
    marked = ADDITION.answering(jnp.array([ADDITION.encode(text)]))[0]
    # From an `=` up to, not including, the newline that ends the answer.
    assert marked.tolist() == [c == "^" for c in "   ^^    ^^^   "]


def test_published_columns_are_drawn_from_their_distribution():
    problems = sample_published_columns(jax.random.key(0), 50_000, ADDITION)
    longer = lengths_of(problems)
    assert longer.max() == 12
    # Its fixed draw of 500 fell into these columns.
    published = {"1-4": 48, "5-6": 105, "8": 116, "10": 151, "12": 80}
    ours = [
        ((longer >= low) & (longer <= high)).sum()
        for low, high in ADDITION.published_columns.values()
    ]
    assert sum(ours) == 50_000
    assert chisquare(list(published.values()), np.array(ours) / 100).pvalue > 1e-3


@pytest.mark.parametrize(
    ("text", "task", "expected"),
    [
        ("123+456", "addition", ("123", "456")),
        ("0+0=0", "addition", ("0", "0")),
        ("9" * 5000 + "+1", "addition", ("9" * 5000, "1")),
        ("1+2+3=6", "three-operands", ("1", "2", "3")),
        ("100-99=001", "subtraction", ("100", "99")),
    ],
)
def test_parse_problem(text, task, expected):
    assert TASKS[task].parse(text, MAX_LENGTH) == expected


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
        TASKS[task].parse(text, MAX_LENGTH)

"""What every task keeps to, whoever wrote it: its arrays against its plain Python."""

import importlib.metadata
import runpy
import types
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from spak_jax.config_sections import MAX_LENGTH
from spak_jax.data import sample_training
from spak_jax.registry import TASKS, Registry
from spak_jax.tasks import Problems, Task

with mock.patch("spak_jax.__main__.main"):
    runpy.run_path(str(ROOT / "examples" / "caesar.py"), run_name="__main__")
EVERY = [TASKS.get(name)() for name in TASKS.names()]
# The longest problems here, and the most symbols of an input of one.
LONGEST, MOST_SYMBOLS = 12, 60


def width_of(task: Task) -> int:
    """The length of the longest problems here."""
    return max(n for n in range(1, LONGEST + 1) if task.input_length(n) <= MOST_SYMBOLS)


sample = jax.jit(
    lambda keys, at_most, width, task: task.sample(keys, at_most, width), static_argnums=(2, 3)
)
render = jax.jit(
    lambda problems, length, task: task.render(problems, length), static_argnums=(1, 2)
)
one_pass_batch = jax.jit(
    lambda problems, length, task: task.batch(problems, length), static_argnums=(1, 2)
)
answers = jax.jit(lambda problems, task: task.answers(problems), static_argnums=1)
written_lengths = jax.jit(lambda problems, task: task.written_lengths(problems), static_argnums=1)
depths = jax.jit(lambda problems, task: task.depths(problems), static_argnums=1)
position_ids = jax.jit(lambda tokens, task: task.position_ids(tokens), static_argnums=1)
answering = jax.jit(lambda tokens, task: task.answering(tokens), static_argnums=1)
drawn_for_training = jax.jit(sample_training, static_argnums=(1, 2))


def on_host(problems) -> Problems:
    return Problems(*map(np.asarray, problems))


def problems_of(task: Task, problems) -> list[tuple[str, ...]]:
    """Arrays as people write them, by their symbols alone."""
    found = []
    for inputs, lengths in zip(*map(np.asarray, problems), strict=True):
        parts = zip(inputs, lengths, strict=True)
        symbols = ("".join(task.symbols[i] for i in each[:length]) for each, length in parts)
        found.append(tuple(map(task.in_written_order, symbols)))
    return found


def drawn(task: Task, seed: int, count: int = 16):
    keys = jax.random.split(jax.random.key(seed), task.inputs)
    width = width_of(task)
    return sample(keys, np.full(count, width), width, task)


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1))
def test_arrays_are_what_plain_python_says(task, seed):
    problems = drawn(task, seed)
    texts = list(map(task.text, problems_of(task, problems)))
    length = task.text_length(width_of(task))
    tokens, mask = map(np.asarray, render(problems, length, task))
    for row, is_answer, text in zip(tokens, mask, texts, strict=True):
        assert len(text) <= length
        assert task.decode(row) == text.ljust(length, "\n")
        assert np.flatnonzero(is_answer).tolist() == [*range(text.index("=") + 1, len(text))]
    assert np.asarray(written_lengths(problems, task)).tolist() == list(map(len, texts))
    symbols, lengths = map(np.asarray, answers(problems, task))
    for row, count, problem in zip(symbols, lengths, problems_of(task, problems), strict=True):
        answer = "".join(task.symbols[i] for i in row[:count])
        assert task.in_written_order(answer) == task.solve(problem)
    sizes = np.asarray(task.lengths(on_host(problems))).tolist()
    assert sizes == list(map(task.length, problems_of(task, problems)))
    found = np.asarray(depths(problems, task))
    assert found.dtype == np.int32 and task.depth_unit
    host = task.depths(on_host(problems))
    assert isinstance(host, np.ndarray) and host.tolist() == found.tolist()


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1))
def test_what_people_write_is_read_back(task, seed):
    problems = problems_of(task, drawn(task, seed))
    for problem in problems:
        text = task.format(problem)
        assert task.parse(text, width_of(task)) == problem
        assert task.parse(f"{text}={task.solve(problem)}", width_of(task)) == problem
        with pytest.raises(ValueError, match="is wrong: it is"):
            task.parse(f"{text}={task.solve(problem)}{task.symbols[0]}", width_of(task))
    arrays = task.arrays(problems)
    assert problems_of(task, arrays) == problems
    wide = task.pad(arrays, arrays.width + 7)
    assert problems_of(task, wide) == problems and wide.width == arrays.width + 7


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_texts_have_room_and_are_as_long_as_is_said(task):
    assert task.parse(task.format(task.example), width_of(task)) == task.example
    for length in (1, 2, width_of(task) - 1):
        problems = task.sample_exact(jax.random.key(0), length, 50)
        texts = list(map(task.text, problems_of(task, problems)))
        assert {task.length(problem) for problem in problems_of(task, problems)} == {length}
        assert max(map(len, texts)) <= task.text_length(length)
        assert min(map(len, texts)) >= task.shortest_text
    assert task.length(task.example) <= width_of(task)
    for text in ("", "=", "!", "\n"):
        with pytest.raises(ValueError, match="is not a problem such as"):
            task.parse(text, width_of(task))
    width = width_of(task)
    with pytest.raises(ValueError, match=f"{width + 1} {task.unit}: at most {width}"):
        too_long = task.symbols[-1] * task.input_length(width + 1)
        task.parse(task.operator.join([too_long] * task.inputs), width)
    with pytest.raises(ValueError, match="kind = 'odd'"):
        task.sample_kind(np.random.default_rng(0), "odd", 3, 4)


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_training_shows_nothing_longer_than_configured(task):
    data = tiny_config(data={"task": task.name, "row_length": task.row_length(6)}).data
    sizes = task.lengths(on_host(drawn_for_training(jax.random.key(0), data, (2_000,))))
    assert sizes.max() == data.longest == 6 and sizes.min() == 1


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_ids_do_not_depend_on_what_follows(task):
    """Decoding gives ids of a text whose answer is not whole yet."""
    length = task.text_length(width_of(task))
    tokens, answer = map(np.asarray, render(drawn(task, 5), length, task))
    there = np.tri(length, dtype=bool)[:, None]
    prompt = np.arange(length) < answer.argmax(-1)[:, None]
    found = position_ids(np.where(there | prompt, tokens, task.end), task)
    if found is not None:
        found = np.asarray(found)
        assert ((found == found[-1]) | ~there).all()


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_hard_problems_are_problems_of_their_length(task):
    random = np.random.default_rng(0)
    for kind in task.kinds:
        for length in (1, 2, 9):
            count = task.kind_count(kind, 30)
            problems = problems_of(task, task.sample_kind(random, kind, length, count))
            assert len(problems) == count
            for problem in problems:
                assert task.parse(task.format(problem), length) == problem
                assert task.length(problem) == length


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31 - 1))
def test_in_one_pass_blanks_hide_the_answer_and_nothing_else(task, seed):
    """All that a row of the one format says is in the other's, and its blanks tell no length."""
    problems, task = drawn(task, seed), type(task)("one-pass")
    length = task.row_length(width_of(task))
    batch = [np.asarray(x) for x in one_pass_batch(problems, length, task)]
    for tokens, targets, answer, problem in zip(*batch, problems_of(task, problems), strict=True):
        prompt, text = task.prompt(problem), task.text(problem)
        assert len(prompt) <= length and task.decode(tokens) == prompt.ljust(length, "\n")
        assert task.decode(targets) == text.ljust(length, "\n")
        assert np.flatnonzero(answer).tolist() == [*range(text.index("=") + 1, len(text))]
        assert set(task.decode(tokens[answer])) == {"_"}
        asked, blanks = prompt.split("=")
        assert len(blanks) == task.answer_length(task.length(problem)) + 1
    rows, _, answer = batch
    np.testing.assert_array_equal(answering(rows, task), rows == task.blank)
    ids = position_ids(rows, task)
    if ids is not None:
        # The blanks have the ids that the answer's symbols have where it is written.
        text, _ = render(problems, length, type(task)())
        written = np.asarray(position_ids(text, type(task)()))
        symbols = answer & (np.asarray(text) != task.end)
        np.testing.assert_array_equal(np.asarray(ids)[symbols], written[symbols])


AS_LONG_AS_ASKED = [
    task for task in EVERY if task.inputs == 1 and task.answer_length(7) == task.input_length(7)
]


@pytest.mark.parametrize("task", AS_LONG_AS_ASKED, ids=lambda task: task.name)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31 - 1), share=st.floats(0, 2))
def test_in_place_each_symbol_is_answered_where_it_stands(task, seed, share):
    """A longer row is filled with newlines, a shorter one cuts both alike."""
    problems, task = drawn(task, seed), type(task)("in-place")
    length = 1 + int(share * task.input_length(width_of(task)))
    rows = one_pass_batch(problems, length, task)
    for tokens, targets, answer, problem in zip(
        *map(np.asarray, rows), problems_of(task, problems), strict=True
    ):
        prompt, right = task.prompt(problem), task.in_written_order(task.solve(problem))
        assert len(prompt) == len(right) + 1 == task.row_length(task.length(problem))
        assert task.decode(tokens) == prompt.ljust(length, "\n")[:length]
        assert task.decode(targets) == f"\n{right}".ljust(length, "\n")[:length]
        assert np.flatnonzero(answer).tolist() == [*range(1, min(length, len(prompt)))]
    np.testing.assert_array_equal(answering(rows.tokens, task), rows.answer)
    assert task.answer_start(task.example) == 1 and "_" not in task.vocabulary


def test_other_answers_have_no_place_in_their_problems():
    for task in EVERY:
        if task not in AS_LONG_AS_ASKED:
            with pytest.raises(ValueError, match=f"'in-place': {task.name} has {task.inputs} inp"):
                type(task)("in-place")
    with pytest.raises(ValueError, match="answered = 'in one go': one of symbol-by-symbol, one-"):
        type(EVERY[0])("in one go")
    with pytest.raises(Exception, match="data.answers = 'in-place': addition has 2 inputs of 7"):
        tiny_config(data={"answers": "in-place"})


def test_a_task_that_answers_otherwise_is_another_task():
    """Programs are kept by task: one for each format."""
    task = type(EVERY[0])
    assert task() == task() and task("one-pass") == task("one-pass")
    assert task() != task("one-pass") and task().vocabulary + "_" == task("one-pass").vocabulary


def test_a_task_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="task 'adition': did you mean addition"):
        TASKS.get("adition")
    with pytest.raises(Exception, match=r"data.task: task 'adition': did you mean addition\?"):
        tiny_config(data={"task": "adition"})


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="task 'addition' is spak_jax.tasks.arithmetic.Addition"):
        TASKS.register("addition")(type("Other", (), {}))


def test_an_installed_package_adds_tasks(monkeypatch):
    point = lambda added: types.SimpleNamespace(name="more", load=lambda: added)  # noqa: E731
    one, other = type("One", (), {}), type("Other", (), {})
    points = [point(one)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    registry = Registry("task", "tasks", ())
    assert registry.names() == ("more",) and registry.get("more") is one and one.name == "more"
    points.append(point(other))
    with pytest.raises(ValueError, match=r"task 'more' is .*\bOne"):
        Registry("task", "tasks", ()).names()


def test_the_longest_problem_is_solved():
    task = TASKS.get("addition")()
    assert task.solve(("9" * MAX_LENGTH, "1")) == "1" + "0" * MAX_LENGTH

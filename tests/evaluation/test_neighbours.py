"""An answer depends on its problem alone: not on neighbours, their order, or what fills rows up."""

import functools

import jax
import numpy as np
import pytest
from conftest import in_turn, with_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import config_of, weights_of

from spak_jax.evaluation import score as score_module
from spak_jax.evaluation.answers import solve
from spak_jax.evaluation.batching import calls, padded_length, rows_per_call
from spak_jax.evaluation.forward import Halting, forward, generate_fn
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.score import Scorer, Settings, score_own_problems
from spak_jax.registry import POSITIONS
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

# What is compared must not be rounded to bfloat16.
pytestmark = pytest.mark.usefixtures("exact_products")

# Those that go by ids of a grid: `tests/positions/test_grid.py`.
SCHEMES = [name for name in POSITIONS.names() if not POSITIONS.get(name).grid_ids]
WAYS = {
    "gpt": ("gpt", None),
    "loop": ("loop", None),
    "loop, confidence": ("loop", Halting("confidence", 0.7, 0.8)),
    "loop, convergence": ("loop", Halting("convergence", 0.8, 0.7)),
}
ALONE, TOGETHER, ROWS = 14, 23, 4


@functools.cache
def programs(scheme, way):
    """Weights, what chooses a token behind each of a text, and what writes."""
    kind, halt = WAYS[way]
    config = config_of(scheme, kind)
    run = forward(config, halt=halt)

    def choose(weights, tokens):
        logits, steps = run(weights, tokens)
        return logits.argmax(-1), steps

    return weights_of(config), jax.jit(choose), jax.jit(generate_fn(config, halt=halt))


def rows_of(prompts, length):
    return np.array([ADDITION.encode(text.ljust(length, "\n")) for text in prompts], np.int32)


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        *in_turn(SCHEMES, ("gpt", "loop")),
        *in_turn(("random-rope", "learned"), list(WAYS)[2:]),
    ],
)
@settings(deadline=None, max_examples=4)
@given(
    st.lists(st.tuples(*[st.integers(0, 999)] * 2), min_size=ROWS, max_size=ROWS),
    st.permutations(range(ROWS)),
)
def test_every_scheme_answers_alone_as_among_others(scheme, way, problems, order):
    weights, choose, write = programs(scheme, way)
    problems = [tuple(map(str, numbers)) for numbers in problems]
    texts = [ADDITION.text(problem).rstrip() for problem in problems]
    together = choose(weights, rows_of(texts, TOGETHER))
    shuffled = choose(weights, rows_of([texts[i] for i in order], TOGETHER))
    prompts = [ADDITION.prompt(problem) for problem in problems]
    starts = np.array(list(map(len, prompts)), np.int32)
    room = np.array([ADDITION.text_length(ADDITION.length(each)) for each in problems])
    room = room.astype(np.int32)
    written = write(weights, rows_of(prompts, TOGETHER), starts, room)
    for i, text in enumerate(texts):
        alone = choose(weights, rows_of([text], ALONE))
        for found, others, same in zip(alone, together, shuffled, strict=True):
            np.testing.assert_array_equal(found[0, : len(text)], others[i, : len(text)])
            np.testing.assert_array_equal(same[order.index(i)], others[i])
        one = slice(i, i + 1)
        alone = write(weights, rows_of(prompts[one], ALONE), starts[one], room[one])
        for found, others in zip(alone, written, strict=True):
            np.testing.assert_array_equal(found[0], others[i, :ALONE])
            assert not others[i, room[i] :].any()


@pytest.mark.parametrize("decode", with_slow([False, True], False))
def test_scores_and_answers_are_those_of_each_problem_alone(decode, half_trained):
    trained = load(half_trained)
    own = [(str(a), str(b)) for a in range(10) for b in range(10)]
    own[3], own[7] = ("1" + "0" * 30, "7"), ("5", "1" + "0" * 9)
    scorer = Scorer(trained, Settings((1,), 1, 0, decode=decode))
    together = scorer(ADDITION.arrays(own))
    right, answers = together.correct, solve(trained, own)
    pairs = zip(answers, own, strict=True)
    assert [
        answer.text == str(sum(map(int, numbers))) for answer, numbers in pairs
    ] == right.tolist()
    some = [3, 7, *np.flatnonzero(right)[:4], *np.flatnonzero(~right)[-4:]]
    assert len(some) == 10
    for i in some:
        alone = scorer(ADDITION.arrays([own[i]]))
        assert (alone.correct[0], alone.loops[0]) == (right[i], together.loops[i])
        assert solve(trained, [own[i]]) == [answers[i]]


@given(st.lists(st.sampled_from([1, 2, 3, 9, 40, 1000, 10_000]), min_size=1, max_size=700))
def test_calls_take_each_problem_once_in_rows_of_its_own_length(lengths):
    seen = []
    for chosen, filled, length in calls(np.array(lengths), ADDITION):
        assert {padded_length(lengths[i], ADDITION) for i in filled} == {length}
        assert filled[: len(chosen)].tolist() == chosen.tolist()
        # No more than twice as many rows as problems, none too many for memory.
        assert len(filled) < 2 * len(chosen) or len(filled) == rows_per_call(length)
        assert len(filled) <= rows_per_call(length)
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_one_long_problem_costs_its_own_tokens_only(half_trained, monkeypatch):
    trained = load(half_trained)
    own = [(str(i), str(i + 1)) for i in range(300)]
    own[17] = ("1" + "0" * 999, "1")
    tokens, widths = [], []
    rows, arrays = score_module.batch_of, Addition.arrays

    def counted(problems, length, task):
        tokens.append(problems.count * length)
        return rows(problems, length, task)

    def measured(task, problems):
        widths.append(arrays(task, problems).inputs.size)
        return arrays(task, problems)

    monkeypatch.setattr(score_module, "batch_of", counted)
    monkeypatch.setattr(Addition, "arrays", measured)
    results, _ = score_own_problems(trained, Settings((1,), 1, 0), own, "standard input")
    assert {n: line.total for n, line in results.lengths.items()} == {
        "1": 9, "2": 89, "3": 201, "1000": 1,
    }  # fmt: skip
    # As rows of the longest they would be 900,000 tokens.
    assert sum(tokens) == 512 * 16 + padded_length(1000, ADDITION)
    assert sum(widths) == 299 * 2 * 3 + 2 * 1000

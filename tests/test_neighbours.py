"""An answer depends on its problem alone: not on neighbours, their order, or what fills rows up."""

import functools
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import config_of, weights_of

from spak_jax import addition, evaluate
from spak_jax.config import Architecture
from spak_jax.solve import solve

# What is compared must not be rounded to bfloat16.
pytestmark = pytest.mark.usefixtures("exact_products")

SCHEMES = get_args(Architecture.model_fields["positions"].annotation)
WAYS = {
    "gpt": ("gpt", None),
    "loop": ("loop", None),
    "loop, confidence": ("loop", evaluate.Halting("confidence", 0.7, 0.8)),
    "loop, convergence": ("loop", evaluate.Halting("convergence", 0.8, 0.7)),
}
ALONE, TOGETHER, ROWS = 14, 23, 4


@functools.cache
def programs(scheme, way):
    """Weights, what chooses a token behind each of a text, and what writes."""
    kind, halt = WAYS[way]
    config = config_of(scheme, kind)
    run = evaluate.forward(config, halt=halt)

    def choose(weights, tokens):
        logits, steps = run(weights, tokens)
        return logits.argmax(-1), steps

    return weights_of(config), jax.jit(choose), jax.jit(evaluate.writer(config, halt=halt))


def rows_of(prompts, length):
    return np.array([addition.encode(text.ljust(length, "\n")) for text in prompts], np.int32)


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        *((scheme, way) for scheme in SCHEMES for way in ("gpt", "loop")),
        *((scheme, way) for scheme in ("random-rope", "learned") for way in list(WAYS)[2:]),
    ],
)
@settings(deadline=None, max_examples=4)
@given(
    st.lists(st.tuples(*[st.integers(0, 999)] * 2), min_size=ROWS, max_size=ROWS),
    st.permutations(range(ROWS)),
)
def test_every_scheme_answers_alone_as_among_others(scheme, way, problems, order):
    weights, choose, write = programs(scheme, way)
    texts = [addition.problem_text(numbers).rstrip() for numbers in problems]
    together = choose(weights, rows_of(texts, TOGETHER))
    shuffled = choose(weights, rows_of([texts[i] for i in order], TOGETHER))
    prompts = [addition.prompt_text(numbers) for numbers in problems]
    starts = np.array(list(map(len, prompts)), np.int32)
    room = np.array([addition.text_length(max(len(str(n)) for n in each)) for each in problems])
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


@pytest.mark.parametrize("decode", [False, True])
def test_scores_and_answers_are_those_of_each_problem_alone(decode, half_trained):
    trained = evaluate.load(half_trained)
    own = [(a, b) for a in range(10) for b in range(10)]
    own[3], own[7] = (10**30, 7), (5, 10**9)
    scorer = evaluate.Scorer(trained, evaluate.Settings((1,), 1, 0, decode=decode))
    together = scorer(addition.problems_from_integers(own))
    right, answers = together.correct, solve(trained, own)
    pairs = zip(answers, own, strict=True)
    assert [answer.text == str(sum(numbers)) for answer, numbers in pairs] == right.tolist()
    some = [3, 7, *np.flatnonzero(right)[:4], *np.flatnonzero(~right)[-4:]]
    assert len(some) == 10
    for i in some:
        alone = scorer(addition.problems_from_integers([own[i]]))
        assert (alone.correct[0], alone.steps[0]) == (right[i], together.steps[i])
        assert solve(trained, [own[i]]) == [answers[i]]


@given(st.lists(st.sampled_from([1, 2, 3, 9, 40, 1000, 10_000]), min_size=1, max_size=700))
def test_calls_take_each_problem_once_in_rows_of_its_own_length(digits):
    seen = []
    for chosen, filled, length in evaluate.calls(np.array(digits), "addition"):
        assert {evaluate.padded_length(digits[i], "addition") for i in filled} == {length}
        assert filled[: len(chosen)].tolist() == chosen.tolist()
        # No more than twice as many rows as problems, none too many for memory.
        assert len(filled) < 2 * len(chosen) or len(filled) == evaluate.rows_per_call(length)
        assert len(filled) <= evaluate.rows_per_call(length)
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(digits)))


def test_one_long_problem_costs_its_own_tokens_only(half_trained, monkeypatch):
    trained = evaluate.load(half_trained)
    own = [(i, i + 1) for i in range(300)]
    own[17] = (10**999, 1)
    tokens, widths = [], []
    rows, arrays = evaluate._problem_rows, addition.problems_from_integers

    def counted(problems, length, task):
        tokens.append(problems.count * length)
        return rows(problems, length, task)

    def measured(problems):
        widths.append(arrays(problems).numbers.size)
        return arrays(problems)

    monkeypatch.setattr(evaluate, "_problem_rows", counted)
    monkeypatch.setattr(addition, "problems_from_integers", measured)
    results, _ = evaluate.score_own_problems(
        trained, evaluate.Settings((1,), 1, 0), own, "standard input"
    )
    assert {n: line["total"] for n, line in results["lengths"].items()} == {
        "1": 9, "2": 89, "3": 201, "1000": 1,
    }  # fmt: skip
    # As rows of the longest they would be 900,000 tokens.
    assert sum(tokens) == 512 * 16 + evaluate.padded_length(1000, "addition")
    assert sum(widths) == 299 * 2 * 3 + 2 * 1000

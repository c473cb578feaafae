"""Generation: a cache says what recomputing says, in every scheme, and what is done is done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_turn, with_slow
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import config_of, weights_of

from spak_jax import models
from spak_jax.evaluation import generate
from spak_jax.evaluation.forward import forward
from spak_jax.registry import POSITIONS
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

# What is compared must not be rounded to bfloat16.
pytestmark = pytest.mark.usefixtures("exact_products")

# Those that go by ids of a grid: `tests/positions/test_grid.py`.
SCHEMES = [name for name in POSITIONS.names() if not POSITIONS.get(name).grid_ids]
ROWS, LENGTH = 4, 20


def decoders_of(config, halt=False):
    """With a cache, and without."""
    thresholds = thresholds_of if halt else None
    return [
        generate.with_cache(config, thresholds=thresholds),
        generate.without_cache(run_of(config) if halt else forward(config)),
    ]


def thresholds_of(tokens):
    """Some tokens halt at once, some later, some never; a token's own symbol decides."""
    return 0.6 + 0.04 * tokens


def run_of(config):
    definition, _ = models.abstract(config)
    return lambda weights, tokens: nnx.merge(definition, weights).halting_logits(
        tokens, thresholds_of(tokens), position_ids=ADDITION.position_ids(tokens)
    )


def reading(decoder):
    """A program that reads a text on from each row's prompt, token by token: what is said there."""

    @jax.jit
    def read(weights, text, prompt_length):
        def upto(at):
            return jnp.where(jnp.arange(LENGTH) <= at[:, None], text, ADDITION.end)

        def step(carry, _):
            at, cache = carry
            logits, taken, cache = decoder.decode_step(weights, upto(at), at, cache)
            return (jnp.minimum(at + 1, LENGTH - 1), cache), (logits, taken)

        at = prompt_length - 1
        cache = decoder.prefill(weights, upto(at))
        return jax.lax.scan(step, (at, cache), length=LENGTH)[1]

    return read


def drawn(seed):
    """Texts, some of them problems and some nonsense, and prompts of different lengths."""
    random = np.random.default_rng(seed)
    text = random.integers(0, len(ADDITION.vocabulary), (ROWS, LENGTH))
    problems = ADDITION.sample_exact(jax.random.key(seed), 4, ROWS // 2)
    text[: ROWS // 2] = ADDITION.render(problems, LENGTH)[0]
    return jnp.asarray(text, jnp.int32), jnp.asarray(random.integers(1, LENGTH + 1, ROWS))


@functools.cache
def programs(scheme, kind, halt=False):
    config = config_of(scheme, kind)
    decoders = decoders_of(config, halt)
    return (
        weights_of(config),
        [reading(decoder) for decoder in decoders],
        [
            jax.jit(functools.partial(generate.generate, decoder, ADDITION.end))
            for decoder in decoders
        ],
    )


def assert_both_say_the_same(scheme, kind, seed, halt=False):
    weights, readers, writers = programs(scheme, kind, halt)
    text, prompt_length = drawn(seed)
    (logits, taken), (expected, expected_taken) = (
        read(weights, text, prompt_length) for read in readers
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(taken, expected_taken)
    for ours, theirs in zip(
        *(write(weights, text, prompt_length) for write in writers), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    return taken


# By default each scheme with the kind that `test_neighbours` leaves out.
@pytest.mark.parametrize(("scheme", "kind"), in_turn(SCHEMES, ("loop", "gpt")))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_caches_say_what_recomputing_says(scheme, kind, seed):
    assert_both_say_the_same(scheme, kind, seed)


@pytest.mark.parametrize("scheme", with_slow(["rope", "coupled-bias"], "coupled-bias"))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_halted_tokens_are_seen_as_they_halted(scheme, seed):
    taken = assert_both_say_the_same(scheme, "loop", seed, halt=True)
    assert taken.min() == 1 and taken.max() == 4


def test_a_bfloat16_cache_is_as_near_as_recomputing():
    exact = config_of("rope", "gpt")
    rounded = exact.model_copy(
        update={"model": exact.model.model_copy(update={"dtype": "bfloat16"})}
    )
    text, prompt_length = drawn(0)
    weights = weights_of(exact)
    truth, _ = reading(decoders_of(exact)[1])(weights, text, prompt_length)
    ours, theirs = (
        np.linalg.norm(reading(decoder)(weights, text, prompt_length)[0] - truth)
        for decoder in decoders_of(rounded)
    )
    assert 0 < ours < 1.5 * theirs < 0.2 * np.linalg.norm(truth)


def test_generation_stops_at_the_newline_and_leaves_prompts_alone():
    """A model that always says 7, then newline after two of them."""
    tokens = jnp.array([ADDITION.encode("1+2=" + "9" * 6), ADDITION.encode("11+2=" + "9" * 5)])

    def run(weights, tokens):
        sevens = (tokens == ADDITION.first_symbol + 7).cumsum(-1)
        chosen = jnp.where(sevens < 2, ADDITION.first_symbol + 7, ADDITION.end)
        return jax.nn.one_hot(chosen, 13), sevens

    written, loops = generate.generate(
        generate.without_cache(run), ADDITION.end, None, tokens, jnp.array([4, 5])
    )
    assert [ADDITION.decode(row) for row in np.asarray(written)] == [
        "1+2=77\n\n\n\n",
        "11+2=77\n\n\n",
    ]
    assert loops[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 0]


def saying(texts):
    """A decoder that writes what it is given, and keeps count of the tokens."""
    calls = []

    def decode_step(weights, tokens, at, cache):
        jax.debug.callback(lambda: calls.append(1))
        chosen = jnp.asarray(texts)[jnp.arange(len(tokens)), at + 1]
        return jax.nn.one_hot(chosen, len(ADDITION.vocabulary)), at, cache

    return generate.Decoder(lambda weights, tokens: (), decode_step), calls


def test_generation_ends_with_the_last_row():
    texts = [ADDITION.encode(text.ljust(30, "\n")) for text in ("1+2=3\n777", "99+1=001\n", "1+1=")]
    decoder, calls = saying(texts)
    prompt_length = jnp.array([4, 5, 30])
    written, at = generate.generate(decoder, ADDITION.end, None, jnp.array(texts), prompt_length)
    jax.effects_barrier()
    # `001` and its newline; the row that is full asks for nothing.
    assert len(calls) == 4
    assert [ADDITION.decode(row).rstrip("\n") for row in np.asarray(written)] == [
        "1+2=3",
        "99+1=001",
        "1+1=",
    ]
    assert at[0].tolist() == [0, 0, 0, 0, 3, 4, *[0] * 24] and not at[2].any()


def test_generation_ends_with_the_buffer():
    texts = jnp.full((2, 9), ADDITION.first_symbol + 7)
    decoder, calls = saying(texts)
    written, _ = generate.generate(decoder, ADDITION.end, None, texts, jnp.array([3, 8]))
    jax.effects_barrier()
    assert (written == texts).all() and len(calls) == 6


@pytest.mark.parametrize("fits", [True, False])
def test_caches_are_taken_unless_they_are_too_large(fits, monkeypatch):
    config, gpt = config_of("rope", "loop").model, config_of("rope", "gpt").model
    numbers = 2 * 4 * ROWS * LENGTH * 32
    monkeypatch.setattr(generate, "CACHED_NUMBERS", numbers if fits else numbers - 1)
    picked = generate.pick_decoder(config, (ROWS, LENGTH), None)
    assert picked == (generate.WITH_CACHE if fits else generate.WITHOUT_CACHE)
    assert generate.pick_decoder(config, (ROWS, LENGTH), 5) == generate.WITHOUT_CACHE
    assert generate.max_cached_batch(config, LENGTH, 1) >= ROWS
    of_a_row = 2 * 3 * LENGTH * 32
    assert generate.max_cached_batch(gpt, LENGTH, None) == (numbers - (not fits)) // of_a_row

"""Biases of steps on a grid: what a cell sees, against masks written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import build, error, random_weights

from spak_jax.evaluation import generate
from spak_jax.evaluation.forward import forward
from spak_jax.models.block import Attention, BlockSettings
from spak_jax.positions.base import SchemeSettings, grid_ids
from spak_jax.positions.grid import GridBias
from spak_jax.tasks.mazes import Mazes

# What is compared must not be rounded to bfloat16.
pytestmark = pytest.mark.usefixtures("exact_products")

HEADS, HEAD_DIM = 2, 8
MODEL = {"positions": "grid-bias", "window": True, "dropout": 0.0, "dtype": "float32"}


def scheme(distance: int) -> GridBias:
    return GridBias(SchemeSettings(7, 16, distance), rngs=nnx.Rngs(0))


def cells_of(side: int, length: int) -> np.ndarray:
    """Row and column of each token, `[length, 2]`: two tokens without a place, then a grid, then
    fillers far below."""
    cells = [(-1, -1)] * 2 + [divmod(i, side) for i in range(side**2)]
    return np.array(cells + [(2**16 - 1, 0)] * (length - len(cells)))


def ids_of(cells: np.ndarray) -> np.ndarray:
    row, column = cells.T
    return np.where(row < 0, 0, grid_ids(row, column))[None]


def seen(cells: np.ndarray, distance: int) -> np.ndarray:
    """Which column of the table each pair of tokens has its bias from, -1 for none."""
    near = [
        (r, c)
        for r in range(-distance, distance + 1)
        for c in range(-distance, distance + 1)
        if abs(r) + abs(c) <= distance
    ]
    step = cells[:, None] - cells
    placed = cells[:, 0] >= 0
    entries = np.full(step.shape[:2], -1)
    for entry, known in enumerate(near):
        entries[(step == known).all(-1) & placed[:, None] & placed] = entry
    entries[:, ~placed] = len(near)
    return entries


@settings(max_examples=10)
@given(side=st.integers(1, 30), more=st.sampled_from([0, 1, 40]), distance=st.integers(1, 3))
def test_every_step_has_its_own_bias_in_grids_of_all_sizes(side, more, distance):
    """As the kernels look biases up: by clipped differences."""
    cells = cells_of(side, 2 + side**2 + more)
    given = scheme(distance).inputs(
        np.zeros((1, len(cells))), positions=None, position_ids=ids_of(cells)
    )
    ids, entries = np.asarray(given.position_ids)[0].astype(int), given.bias_entries
    clip = len(entries) // 2 - 1
    found = entries[clip + np.clip(ids[:, None] - ids, -clip, clip)]
    expected = seen(cells, distance)
    np.testing.assert_array_equal(np.where(ids > 0, found, entries[-1]), expected)
    assert GridBias.initial_bias(HEADS, distance).shape == (HEADS, expected.max() + 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attended(implementation, distance, options, qkv, table, ids):
    """What heads take of values, and its gradients of q, k, v and the table."""
    causal, windowed = options

    def mixed(qkv, table):
        block = Attention(
            BlockSettings(
                HEADS * HEAD_DIM, HEADS, 1, causal=causal, window=distance if windowed else None,
                bias_table=table, attention=implementation,
            ),
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        given = scheme(distance).inputs(ids, positions=None, position_ids=ids)
        return block.mix_heads(qkv, position_inputs=given)

    out, pull = jax.vjp(mixed, qkv, table)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


@functools.partial(jax.jit, static_argnums=0)
def by_masks(options, qkv, table, entries):
    """As `attended`, of the entry of each pair."""
    causal, windowed = options

    def mixed(qkv, table):
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        scores += jnp.where(entries < 0, 0, table[:, entries])
        counts = np.tri(len(entries), dtype=bool) if causal else np.ones(entries.shape, bool)
        counts = counts & ((entries >= 0) | (not windowed))
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, where=counts), v)

    out, pull = jax.vjp(mixed, qkv, table)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("side", "distance", "options"),
    [(3, 1, (False, True)), (4, 2, (True, True)), (3, 1, (False, False)), (8, 1, (False, True))],
)
def test_attention_is_that_of_explicit_masks(implementation, side, distance, options):
    """The last are rows too long for one program."""
    cells = cells_of(side, 2 + side**2 + 4)
    random = np.random.default_rng(side)
    qkv = random.standard_normal((2, len(cells), 3, HEADS, HEAD_DIM)).astype(np.float32)
    entries = seen(cells, distance)
    table = random.standard_normal((HEADS, entries.max() + 1)).astype(np.float32)
    ids = np.repeat(ids_of(cells), 2, 0)
    found = attended(implementation, distance, options, qkv, table, ids)
    for value, truth in zip(found, by_masks(options, qkv, table, entries), strict=True):
        assert error(value, truth) < 1e-5


def maze_model(**data):
    data = {"task": "mazes", "max_length": 3, "bridge_fraction": 0.0, "row_length": 60} | data
    config = tiny_config(model=MODEL | {"causal": "answers" not in data}, data=data)
    weights = random_weights(config)
    return config, weights, build(config, weights)


def test_rows_may_be_longer_and_nothing_is_seen_beyond_its_reach():
    """What fills a row up is not seen, though tokens see both sides, nor is what is more steps
    away than there are loops."""
    config, _, network = maze_model(answers="in-place")
    task = Mazes("in-place")
    logits = nnx.jit(
        lambda network, tokens: network(tokens, position_ids=task.position_ids(tokens))
    )
    problems = task.sample_exact(jax.random.key(1), 3, 4)
    short, long = (np.asarray(task.batch(problems, length).tokens) for length in (26, 45))
    expected = np.asarray(logits(network, short))
    assert error(logits(network, long)[:, :26], expected) < 1e-5
    changed = short.copy()
    changed[:, 13] = task.first_symbol + (changed[:, 13] - task.first_symbol + 1) % 4
    moved = (np.abs(np.asarray(logits(network, changed)) - expected) > 1e-5).any((0, 2))
    # The middle of a maze of 5 x 5 cells.
    steps = [abs(r - 2) + abs(c - 2) for r in range(5) for c in range(5)]
    assert moved.tolist() == [False] + [step <= config.model.loops for step in steps]


def test_a_cache_and_one_launch_say_what_recomputing_says():
    config, _, network = maze_model()
    weights, task = nnx.state(network), Mazes()
    text, length = task.text(task.example), task.text_length(2)
    prompt = task.encode(task.prompt(task.example).ljust(length, "\n"))

    def write(decoder):
        written = functools.partial(generate.generate, decoder, task.end)
        return jax.jit(written)(weights, np.array([prompt], np.int32), np.array([10], np.int32))[0]

    recomputed = write(generate.without_cache(forward(config)))
    np.testing.assert_array_equal(write(generate.with_cache(config)), recomputed)
    tokens = jnp.array([task.encode(text)])
    ids = task.position_ids(tokens)
    whole = nnx.jit(lambda network: network(tokens, position_ids=ids))
    launched = nnx.jit(lambda network: network.fused_forward(tokens, position_ids=ids)[0])
    assert error(launched(network), whole(network)) < 1e-5


def test_ids_of_another_kind_are_refused():
    with pytest.raises(
        Exception, match="'grid-bias' goes by position ids of a grid: those of data"
    ):
        tiny_config(model=MODEL)
    with pytest.raises(Exception, match="'coupled-bias' goes by position ids of a line: those of"):
        maze = {"task": "mazes", "max_length": 2, "bridge_fraction": 0.0}
        tiny_config(model=MODEL | {"positions": "coupled-bias"}, data=maze)

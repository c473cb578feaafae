"""Rows with a window, or of several segments, visit only the blocks that masks leave them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import spak_jax as spak
from pallas_kernels import attention
from pallas_kernels.ops.attention import api, block_mask, flash, reference, windowed
from spak_jax import models

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="plain rows of a CPU")

LENGTH, BLOCK = 70, 16
KINDS = ("counted", "aligned", "drawn", "large", "none")


def row_of_ids(kind, draw, length=LENGTH):
    """Ids as tasks give them, and as none does."""
    if kind == "counted":
        return np.arange(length) + 2
    if kind == "aligned":
        # Symbols, `=`, the answer's places, newlines: `Task.aligned_ids`.
        count = (length - 1) // 2 - draw.integers(0, 6)
        places = np.arange(count) + 2
        return np.concatenate([places, [1], places, np.zeros(length - 1 - 2 * count, int)])
    highest = 2**31 if kind == "large" else length
    return np.zeros(length, int) if kind == "none" else draw.integers(0, highest, length)


def seen_pairs(ids, segment_ids, window, causal):
    """bool `[batch, length, length]`, by the words of `attention`."""
    query, key = ids.astype(np.int64)[:, :, None], ids.astype(np.int64)[:, None]
    seen = (key == 0) | (np.abs(query - key) <= window)
    seen &= segment_ids[:, :, None] == segment_ids[:, None]
    return np.tril(seen) if causal else seen


masks = jax.jit(block_mask.visited, static_argnums=(0, 1, 2), static_argnames=("window", "causal"))


@settings(deadline=None, max_examples=40)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    window=st.sampled_from([0, 1, 5]),
    causal=st.booleans(),
    segments=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)
def test_no_block_is_left_out_in_which_a_query_sees_a_key(kinds, window, causal, segments, seed):
    draw = np.random.default_rng(seed)
    ids = np.stack([row_of_ids(kind, draw) for kind in kinds]).astype(np.int32)
    segment_ids = np.sort(draw.integers(-1, segments - 1, ids.shape, np.int32))
    block_q, block_k = BLOCK, 2 * BLOCK
    found = masks(
        LENGTH, block_q, block_k, ids=ids, segment_ids=segment_ids, window=window, causal=causal
    )
    pairs = seen_pairs(ids, segment_ids, window, causal)
    blocks_q, blocks_k = -(-LENGTH // block_q), -(-LENGTH // block_k)
    filled = np.zeros((2, blocks_q * block_q, blocks_k * block_k), bool)
    filled[:, :LENGTH, :LENGTH] = pairs
    needed = filled.reshape(2, blocks_q, block_q, blocks_k, block_k).any((2, 4))
    assert not (needed & ~np.asarray(found)).any()
    blocks, counts = map(np.asarray, block_mask.listed(found))
    for row, (numbers, count) in zip(
        np.asarray(found).reshape(-1, blocks_k),
        zip(blocks.reshape(-1, blocks_k), counts.ravel(), strict=True),
        strict=True,
    ):
        assert numbers[:count].tolist() == np.flatnonzero(row).tolist()


@pytest.mark.parametrize(("kind", "most"), [("counted", 3), ("aligned", 7)])
def test_a_long_row_visits_few_blocks(kind, most):
    """Each block itself and its neighbours, in both runs where ids run twice, and the newlines."""
    length, block = 1024, 32
    ids = row_of_ids(kind, np.random.default_rng(0), length)[None].astype(np.int32)
    found = masks(length, block, block, ids=ids, segment_ids=None, window=1, causal=False)
    visits = np.asarray(found)[0]
    # The block in which one run ends and the next begins meets both of their ends.
    assert np.sort(visits.sum(1))[-2] <= most and visits.sum(1).max() <= most + 2
    # Newlines have no place: every query sees them.
    assert visits[:, -1].all() == (kind == "aligned")


def inputs(seed, length=LENGTH, heads=2, head_dim=8):
    draw = np.random.default_rng(seed)
    q, k, v, d_out = (
        draw.standard_normal((2, length, heads, head_dim), np.float32) for _ in range(4)
    )
    return q, k, v, draw.standard_normal((heads, 4), np.float32), d_out


@partial(jax.jit, static_argnames=("implementation", "causal"))
def outputs_and_gradients(q, k, v, table, d_out, ids, segment_ids, *, implementation, causal):
    def of(*given):
        q, k, v, table = given
        return attention(
            q, k, v, bias_table=table, ids=ids, segment_ids=segment_ids, window=1, causal=causal,
            implementation=implementation,
        )  # fmt: skip

    out, pull = jax.vjp(of, q, k, v, table)
    return (out, *pull(d_out))


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of these tests are of several blocks, streamed and in plain `jnp`."""
    monkeypatch.setattr(api, "_whole_row", lambda *_: None)
    monkeypatch.setattr(
        api,
        "_flash_block_sizes",
        lambda *_: flash.BlockSizes(BLOCK, BLOCK, num_warps=4, num_stages=1),
    )
    monkeypatch.setattr(windowed, "BLOCK", BLOCK)
    monkeypatch.setattr(windowed, "SHORTEST", LENGTH)
    # What was compiled with other sizes is not taken, nor left behind.
    for compiled in (outputs_and_gradients, outputs):
        compiled.clear_cache()
    yield
    for compiled in (outputs_and_gradients, outputs):
        compiled.clear_cache()


CASES = {
    "kinds": st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    "causal": st.booleans(),
    "segments": st.sampled_from([1, 3]),
    "seed": st.integers(0, 2**16),
}


def drawn_masks(kinds, segments, seed):
    draw = np.random.default_rng(seed)
    ids = np.stack([row_of_ids(kind, draw) for kind in kinds]).astype(np.int32)
    return ids, np.sort(draw.integers(0, segments, ids.shape, np.int32))


@pytest.mark.gpu
def test_kernels_equal_the_reference(small_blocks):
    """Outputs and all gradients, of any ids."""

    @settings(deadline=None, max_examples=6)
    @given(**CASES)
    def equal(kinds, causal, segments, seed):
        arguments = *inputs(seed), *drawn_masks(kinds, segments, seed)
        with jax.default_matmul_precision("highest"):
            found = outputs_and_gradients(*arguments, implementation="pallas", causal=causal)
            truth = outputs_and_gradients(*arguments, implementation="xla", causal=causal)
        for value, expected in zip(found, truth, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=3e-5)

    equal()


@pytest.mark.gpu
def test_kernels_visit_what_is_listed_and_nothing_else(small_blocks, monkeypatch):
    """The bits are those of visiting every block; and what is not listed adds nothing."""
    taken = block_mask.visited

    # One program for all ways: the one segment's id, which masks nothing, says which it is.
    def changed(*sizes, segment_ids, **more):
        visited, way = taken(*sizes, segment_ids=segment_ids, **more), segment_ids[0, 0]
        without = visited.at[:, 1].set(False).at[:, :, 2].set(False)
        return jnp.select([way == 1, way == 2], [jnp.full_like(visited, True), without], visited)

    monkeypatch.setattr(block_mask, "visited", changed)
    ids, segment_ids = drawn_masks(("aligned", "counted"), 1, 1)
    few, every, without = (
        outputs_and_gradients(
            *inputs(1), ids, segment_ids + way, implementation="pallas", causal=False
        )
        for way in range(3)
    )
    for value, expected in zip(few, every, strict=True):
        np.testing.assert_array_equal(value, expected)
    of_block = lambda x, i: np.abs(x[:, i * BLOCK : (i + 1) * BLOCK]).max()  # noqa: E731
    out, d_q, d_k, d_v, _ = map(np.asarray, without)
    for i in range(-(-LENGTH // BLOCK)):
        for value, left_out in ((out, 1), (d_q, 1), (d_k, 2), (d_v, 2)):
            assert (of_block(value, i) > 0) == (i != left_out)


@partial(jax.jit, static_argnames=("causal",))
def outputs(q, k, v, table, ids, segment_ids, *, causal):
    return attention(
        q, k, v, positions=np.arange(q.shape[1]), bias_table=table, ids=ids,
        segment_ids=segment_ids, window=1, causal=causal, implementation="xla",
    )  # fmt: skip


@partial(jax.jit, static_argnames=("causal",))
def truth(q, k, v, table, ids, segment_ids, *, causal):
    return reference.attention(
        q, k, v, positions=np.arange(q.shape[1]), bias_table=table, ids=ids,
        segment_ids=segment_ids, window=1, clip=1, dropout_rate=0, words=None,
        scale=q.shape[-1] ** -0.5, causal=causal,
    )  # fmt: skip


@on_a_cpu
def test_plain_rows_by_blocks_equal_the_reference(small_blocks, monkeypatch):
    """Biases chosen, and looked up."""

    @settings(deadline=None, max_examples=12)
    @given(**CASES)
    def equal(kinds, causal, segments, seed):
        arguments = *inputs(seed)[:4], *drawn_masks(kinds, segments, seed)
        found, expected = (way(*arguments, causal=causal) for way in (outputs, truth))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)

    equal()
    outputs.clear_cache()
    monkeypatch.setattr(windowed, "LARGEST_CHOSEN", 0)
    equal()


@on_a_cpu
def test_what_is_not_finite_is_lost_where_it_is_seen(small_blocks):
    q, k, v, table, _ = inputs(3)
    ids, segment_ids = drawn_masks(("counted", "aligned"), 1, 3)
    k[0, 20, 1, 0], v[1, 40, 0, 3], q[1, 3, 0, 0] = np.nan, np.inf, np.nan
    found, expected = (
        np.asarray(way(q, k, v, table, ids, segment_ids, causal=False)) for way in (outputs, truth)
    )
    assert 0 < np.isnan(expected).sum() < expected.size
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@on_a_cpu
def test_gradients_of_plain_rows_are_the_references(small_blocks):
    """Bit by bit, and under `vmap`."""
    *arguments, d_out = inputs(4)
    masks = drawn_masks(("counted", "aligned"), 1, 4)

    def gradients(way):
        def of(table, scale):
            return (way(*arguments[:3], table * scale, *masks, causal=True) * d_out).sum()

        return jax.vmap(jax.grad(of), (None, 0))(arguments[3], np.float32([1, 2]))

    for value, expected in zip(gradients(outputs), gradients(truth), strict=True):
        np.testing.assert_array_equal(value, expected)


@on_a_cpu
def test_loops_of_a_model_keep_no_square_of_a_long_row():
    """Neither scanned, nor as many as each sequence asks for; short rows are left whole."""
    config = spak.Config.from_file("parity")
    graph, state = nnx.split(nnx.eval_shape(lambda: models.build(config, jax.random.key(0))))

    def squares(length, loops):
        tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
        of = lambda state, tokens, ids: nnx.merge(graph, state)(  # noqa: E731
            tokens, position_ids=ids, loops=loops
        )
        # Of two rows and two heads.
        return f"[2,2,{length},{length}]" in str(jax.make_jaxpr(of)(state, tokens, tokens))

    for loops in (3, jnp.int32([3, 5])):
        assert not squares(1024, loops) and not squares(windowed.SHORTEST, loops)
        assert squares(windowed.SHORTEST - 1, loops)


@on_a_cpu
def test_what_blocks_are_not_for_is_left_to_the_reference():
    q = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
    ids = np.ones((1, 1024), np.int32)

    def squares(ids=ids, window=1, **options):
        of = lambda q: attention(q, q, q, ids=ids, window=window, **options)  # noqa: E731
        return "1024,1024]" in str(jax.make_jaxpr(of)(q))

    assert not squares()
    assert squares(dropout_rate=0.1, dropout_key=jax.random.key(0))
    assert squares(ids=ids.astype(np.float32))
    assert squares(window=None)

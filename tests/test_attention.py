"""The attention kernels against plain `jnp`, outputs and every gradient.

On a machine without a GPU the kernels run in interpret mode; with one, compiled for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import attention, dispatch, reference
from pallas_kernels.tile import MASKED


@pytest.fixture(autouse=True, scope="module")
def quick_compiling():
    """Interpreted kernels compile slowly and run in no time; the GPU compiles what users get."""
    on_cpu = jax.default_backend() == "cpu"
    jax.config.update("jax_disable_most_optimizations", on_cpu)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def relative_error(value, truth):
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert np.isfinite(value).all()
    # Against a size of at least 0.1 a number: a gradient may be zero in truth.
    return np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 0.1 * truth.size**0.5)


def normal(seed, shape, dtype="float32", scale=1.0):
    drawn = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(drawn, jnp.float32).astype(dtype)


def outputs_and_gradients(implementation, q, k, v, d_out, bias_table, **options):
    """The output and the gradients of q, k, v and, where there is one, the bias table."""

    def projected(q, k, v, bias_table):
        out = attention(q, k, v, bias_table=bias_table, implementation=implementation, **options)
        return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(), out

    wanted = (0, 1, 2) if bias_table is None else (0, 1, 2, 3)
    gradients, out = jax.jit(jax.grad(projected, wanted, has_aux=True))(q, k, v, bias_table)
    return (out, *gradients)


def assert_equals_reference(shape, dtype="float32", scale=1.0, bias_table=None, seed=0, **options):
    """The kernel in `dtype` against float32 `jnp` on the same, rounded, inputs."""
    q, k, v, d_out = (normal(seed + i, shape, dtype, scale if i < 2 else 1) for i in range(4))
    found = outputs_and_gradients("pallas", q, k, v, d_out, bias_table, **options)
    exact = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    truth = outputs_and_gradients("xla", *exact, bias_table, **options)
    for name, value, expected in zip(
        ("out", "d_q", "d_k", "d_v", "d_bias"), found, truth, strict=False
    ):
        error = relative_error(value, expected)
        # Larger scores make a sharper softmax, which passes the inputs' rounding on.
        assert error <= TOLERANCE[dtype] * max(1.0, scale**2), (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 7, 24, 63, 64])
def test_rope_attention(length, dtype):
    assert_equals_reference((2, length, 2, 32), dtype, positions=jnp.arange(length))


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype"),
    [(65, 32, "float32"), (129, 64, "bfloat16"), (129, 20, "float32"), (200, 128, "float16")],
)
def test_long_rows_are_streamed(length, head_dim, dtype):
    assert_equals_reference((1, length, 2, head_dim), dtype, positions=jnp.arange(length))


@settings(deadline=None, max_examples=8)
@given(
    length=st.sampled_from([1, 2, 15, 16, 17, 33, 40, 65, 90]),
    heads=st.integers(1, 3),
    half=st.sampled_from([8, 10, 16, 24, 32]),
    causal=st.booleans(),
    rope=st.sampled_from(["none", "shared", "by row"]),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    masks=st.sampled_from(["none", "segments", "bias", "window", "bias and window"]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(length, heads, half, causal, rope, rate, masks, seed):
    draw = np.random.default_rng(seed)
    integers = lambda high: jnp.asarray(draw.integers(0, high, (2, length)), jnp.int32)  # noqa: E731
    options = {"causal": causal, "dropout_rate": rate, "dropout_key": jax.random.key(seed)}
    if rope != "none":
        options["positions"] = jnp.arange(length) if rope == "shared" else integers(500)
    if masks == "segments":
        options["segment_ids"] = integers(3)
    elif masks != "none":
        options["ids"] = integers(6)
    clip = int(draw.integers(0, 3))
    if "window" in masks:
        options["window"] = clip
    table = normal(seed + 9, (heads, 2 * clip + 2)) if "bias" in masks else None
    assert_equals_reference((2, length, heads, 2 * half), bias_table=table, seed=seed, **options)


def test_large_scores():
    assert_equals_reference((2, 33, 2, 32), scale=6.0, positions=jnp.arange(33))


def test_a_query_that_sees_no_key_gets_zeros_and_no_nan():
    """Only the window can leave one: itself is always near, so nothing is lost; ids prove it."""
    q = normal(0, (1, 16, 1, 16))
    ids = jnp.arange(16)[None] * 10 + 1
    for implementation in dispatch.IMPLEMENTATIONS:
        out = attention(q, q, q, ids=ids, window=1, causal=False, implementation=implementation)
        np.testing.assert_allclose(out, q, rtol=1e-5, atol=1e-6)
    assert -np.inf < MASKED


def test_gradient_of_the_reference_by_finite_differences():
    """The truth itself, through RoPE, bias and window."""
    q, k, v = (normal(i, (1, 5, 2, 4)) for i in range(3))
    ids = jnp.array([[1, 2, 0, 1, 3]])

    def f(q, k, v, table):
        out = attention(
            q, k, v, positions=jnp.arange(5), ids=ids, bias_table=table, window=1, scale=0.5,
            implementation="xla",
        )  # fmt: skip
        return jnp.sin(out).sum()

    arguments = (q, k, v, normal(3, (2, 4)))
    check_grads(f, arguments, order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)


def test_dropout_keeps_the_asked_share_and_its_bits_are_uniform():
    rows, counters = jnp.arange(64)[:, None], jnp.arange(4096)[None]
    seed = reference.dropout_seed(jax.random.key(0))
    bits = np.asarray(reference.dropout_bits(*seed, rows, counters))
    for rate in (0.1, 0.5, 0.9):
        dropped = (bits < reference.dropout_threshold(rate)).mean()
        assert abs(dropped - rate) < 4 * (rate * (1 - rate) / bits.size) ** 0.5
    # Each of the 32 bits is fair, neighbours and rows are uncorrelated.
    ones = np.array([((bits >> i) & 1).mean() for i in range(32)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / bits.size**0.5
    centred = bits / 2**32 - 0.5
    for shifted in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, 64, 1)):
        assert abs((centred * shifted).mean() * 12) < 5 / bits.size**0.5
    other_seed = reference.dropout_seed(jax.random.key(1))
    other = np.asarray(reference.dropout_bits(*other_seed, rows, counters))
    assert abs((centred * (other / 2**32 - 0.5)).mean() * 12) < 5 / bits.size**0.5


def test_the_same_key_drops_the_same_and_another_does_not():
    q = normal(0, (1, 16, 2, 16))
    run = lambda key: attention(  # noqa: E731
        q, q, q, dropout_rate=0.5, dropout_key=jax.random.key(key), implementation="pallas"
    )
    assert (run(0) == run(0)).all()
    assert (run(0) != run(1)).any()


def test_under_vmap_scan_and_grad():
    q = normal(0, (3, 2, 16, 2, 16))
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(implementation):
        def one(q, key):
            def body(x, step_key):
                x = attention(
                    x, x, x, positions=jnp.arange(16), dropout_rate=0.2, dropout_key=step_key,
                    implementation=implementation,
                )  # fmt: skip
                return x, None

            return jax.lax.scan(body, q, jax.random.split(key, 2))[0].sum()

        return jax.jit(jax.grad(lambda q: jax.vmap(one)(q, keys).sum()))(q)

    assert relative_error(loss("pallas"), loss("xla")) < 1e-5


def test_under_data_parallel_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q = normal(0, (2, 16, 2, 16))
    spec = jax.sharding.PartitionSpec("data")
    local = lambda q: attention(q, q, q, positions=jnp.arange(16), implementation="pallas")  # noqa: E731
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    gradient = jax.jit(jax.grad(lambda q: sharded(q).sum()))(q)
    assert relative_error(gradient, jax.grad(lambda q: local(q).sum())(q)) < 1e-6


BAD = {
    "shapes": ({"k": (2, 8, 2, 8)}, "q, k, v are"),
    "odd head": ({"shape": (2, 8, 2, 15)}, "head_dim = 15"),
    "positions": ({"positions": jnp.arange(7)}, "positions are"),
    "ids": ({"ids": jnp.zeros((2, 7), int), "window": 1}, "ids are"),
    "bias without ids": ({"bias_table": jnp.zeros((2, 4))}, "need ids"),
    "bias shape": (
        {"ids": jnp.zeros((2, 8), int), "bias_table": jnp.zeros((2, 5))}, "bias_table is"
    ),
    "window": (
        {"ids": jnp.zeros((2, 8), int), "bias_table": jnp.zeros((2, 4)), "window": 3}, "window = 3"
    ),
    "rate": ({"dropout_rate": 1.0}, "dropout_rate = 1.0"),
    "implementation": ({"implementation": "magic"}, "implementation = 'magic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit_are_named(case):
    options, said = BAD[case]
    options = dict(options)
    q = normal(0, options.pop("shape", (2, 8, 2, 16)))
    k = normal(1, options.pop("k")) if "k" in options else q
    with pytest.raises(ValueError, match=said):
        attention(q, k, q, **options)

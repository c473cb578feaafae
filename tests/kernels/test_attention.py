"""The attention kernels against plain `jnp`, outputs and every gradient.

On a machine without a GPU the kernels run in interpret mode; with one, compiled for it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_turn, with_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import attention, choose, dropout, targets, tiles
from pallas_kernels.ops.attention import api, reference
from pallas_kernels.ops.attention.tile import AttentionInputs, Options

pytestmark = pytest.mark.gpu


TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def relative_error(value, truth):
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert np.isfinite(value).all()
    # Against a size of at least 0.1 a number: a gradient may be zero in truth.
    return np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 0.1 * truth.size**0.5)


def normal(seed, shape, dtype="float32", scale=1.0):
    drawn = np.random.default_rng(seed).standard_normal(shape) * scale
    return drawn.astype(np.float32).astype(jnp.dtype(dtype))


needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="too long a row to interpret; needs a GPU"
)


def poison(shape, dtype):
    """Fills memory with NaN and frees it again: what is not written would show."""
    nothing = np.full(shape, np.nan, jnp.dtype(dtype))
    jax.block_until_ready([jax.device_put(nothing) for _ in range(8)])


# Of `attention`, what is no array; one program serves all tests that give it the same shapes.
STATIC = ("implementation", "causal", "window", "dropout_rate", "scale")
attend = jax.jit(attention, static_argnames=STATIC)


@partial(jax.jit, static_argnames=STATIC)
def outputs_and_gradients(q, k, v, d_out, bias_table=None, **options):
    """The output and the gradients of q, k, v and, where there is one, the bias table."""

    def projected(q, k, v, bias_table):
        out = attention(q, k, v, bias_table=bias_table, **options)
        return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(), out

    wanted = (0, 1, 2) if bias_table is None else (0, 1, 2, 3)
    gradients, out = jax.grad(projected, wanted, has_aux=True)(q, k, v, bias_table)
    return (out, *gradients)


def assert_equals_reference(shape, dtype="float32", scale=1.0, bias_table=None, seed=0, **options):
    """The kernel in `dtype` against float32 `jnp` on the same, rounded, inputs."""
    q, k, v, d_out = (normal(seed + i, shape, dtype, scale if i < 2 else 1) for i in range(4))
    poison(shape, dtype)
    found = outputs_and_gradients(q, k, v, d_out, bias_table, implementation="pallas", **options)
    exact = [x.astype(np.float32) for x in (q, k, v, d_out)]
    # A GPU multiplies float32 in tf32 by default.
    with jax.default_matmul_precision("highest"):
        truth = outputs_and_gradients(*exact, bias_table, implementation="xla", **options)
    for name, value, expected in zip(
        ("out", "d_q", "d_k", "d_v", "d_bias"), found, truth, strict=False
    ):
        error = relative_error(value, expected)
        # Larger scores make a sharper softmax, which passes the inputs' rounding on; in a bias's
        # gradient the terms of a row cancel.
        amplified = max(1.0, scale**2) * (10 if name == "d_bias" else 1)
        assert error <= TOLERANCE[dtype] * amplified, (name, error)


@pytest.mark.parametrize(("length", "dtype"), in_turn([1, 7, 24, 63, 64], list(TOLERANCE)))
def test_rope_attention(length, dtype):
    assert_equals_reference((2, length, 2, 32), dtype, positions=np.arange(length))


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype"),
    [(65, 32, "float32"), (129, 64, "bfloat16"), (129, 20, "float32"), (200, 128, "float16")],
)
def test_long_rows_are_streamed(length, head_dim, dtype):
    assert_equals_reference((1, length, 2, head_dim), dtype, positions=np.arange(length))


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1000, 4096])
def test_rows_of_a_language_model(length, dtype):
    assert_equals_reference((1, length, 2, 64), dtype, positions=np.arange(length))


@pytest.mark.parametrize(("target", "length"), in_turn(targets.TARGETS, [24, 90]))
def test_tiles_of_every_target(length, target):
    """On a CPU, with the tiles that each GPU would take."""
    options = Options(
        length=length, head_dim=32, scale=0.2, causal=True, rate=0.0, clip=None, windowed=False,
        target=target, interpret=jax.default_backend() == "cpu",
    )  # fmt: skip
    q, k, v, d_out = (normal(i, (1, length, 2, 32)) for i in range(4))

    @jax.jit
    def tiled(*qkv):
        run = lambda *x: api.run_kernels((x, None), AttentionInputs(), options)  # noqa: E731
        out, pull = jax.vjp(run, *qkv)
        return (out, *pull(d_out))

    with jax.default_matmul_precision("highest"):
        truth = outputs_and_gradients(q, k, v, d_out, scale=0.2, implementation="xla")
    for value, expected in zip(tiled(q, k, v), truth, strict=True):
        assert relative_error(value, expected) < 1e-5


@settings(deadline=None, max_examples=5)
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
    integers = lambda high: draw.integers(0, high, (2, length), np.int32)  # noqa: E731
    options = {"causal": causal, "dropout_rate": rate, "dropout_key": jax.random.key(seed)}
    if rope != "none":
        options["positions"] = np.arange(length) if rope == "shared" else integers(500)
    if masks == "segments":
        options["segment_ids"] = integers(3)
    elif masks != "none":
        options["ids"] = integers(6)
    clip = int(draw.integers(0, 3))
    if "window" in masks:
        options["window"] = clip
    table = normal(seed + 9, (heads, 2 * clip + 2)) if "bias" in masks else None
    assert_equals_reference((2, length, heads, 2 * half), bias_table=table, seed=seed, **options)


@pytest.mark.parametrize("length", [24, 80])
def test_keys_without_an_id_have_a_bias_of_their_own(length):
    """The table's last entry: its gradient is a sum over all pairs with such a key."""
    ids = np.arange(length)[None] % 5
    q, k, v, d_out = (normal(i, (1, length, 2, 16)) for i in range(4))
    table = normal(4, (2, 2 * 2 + 2))
    with jax.default_matmul_precision("highest"):
        found, truth = (
            outputs_and_gradients(q, k, v, d_out, table, ids=ids, implementation=way)[4]
            for way in ("pallas", "xla")
        )
    assert np.abs(truth)[:, -1].min() > 1e-3
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "implementation"),
    in_turn([(24, 3, 32), (33, 1, 20), (130, 2, 16)], ["pallas", "xla"]),
)
def test_q_k_and_v_side_by_side(sizes, implementation):
    """The same output, and the same gradients in one array, as of three arrays."""
    length, heads, head_dim = sizes
    qkv = normal(0, (2, length, 3, heads, head_dim))
    d_out = normal(1, (2, length, heads, head_dim))
    options = {
        "positions": np.arange(length),
        "dropout_rate": 0.1,
        "dropout_key": jax.random.key(3),
        "implementation": implementation,
    }

    @jax.jit
    def of(*qkv):
        out, pull = jax.vjp(lambda *x: attention(*x, **options), *qkv)
        return out, pull(d_out)

    out, (d_qkv,) = of(qkv)
    apart, d_apart = of(*np.moveaxis(qkv, 2, 0))
    # Two programs, which the compiler may fuse, and so round, differently.
    few_ulps = {"rtol": 4 * np.finfo(np.float32).eps, "atol": 1e-6}
    np.testing.assert_allclose(out, apart, **few_ulps)
    np.testing.assert_allclose(d_qkv, np.stack(d_apart, axis=2), **few_ulps)


def test_large_scores():
    assert_equals_reference((2, 33, 2, 32), scale=6.0, positions=np.arange(33))


def test_a_window_of_one_leaves_each_token_itself():
    """Every query sees at least itself: ids far apart leave it nothing else."""
    q = normal(0, (1, 16, 1, 16))
    ids = np.arange(16)[None] * 10 + 1
    for implementation in ("pallas", "xla"):
        with jax.default_matmul_precision("highest"):
            out = attend(q, q, q, ids=ids, window=1, causal=False, implementation=implementation)
        np.testing.assert_allclose(out, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [24, 80])
def test_rows_of_nothing_but_padding(length):
    """All zero, in a segment of their own or in none: finite, and no gradient but to values."""
    nothing = np.zeros((2, length, 2, 32), np.float32)
    segments = np.zeros((2, length), np.int32)
    out, d_q, d_k, _ = map(
        np.asarray,
        outputs_and_gradients(
            nothing, nothing, nothing, nothing + 1, segment_ids=segments, implementation="pallas"
        ),
    )
    assert not out.any() and not d_q.any() and not d_k.any()


def test_the_same_bits_on_every_run():
    shape, options = (2, 40, 2, 32), {"positions": np.arange(40), "dropout_rate": 0.1}
    q, k, v, d_out = (normal(i, shape, "bfloat16") for i in range(4))
    runs = [
        outputs_and_gradients(
            q, k, v, d_out, dropout_key=jax.random.key(1), implementation="pallas", **options
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_gradient_of_the_reference_by_finite_differences():
    """The truth itself, through RoPE, bias and window."""
    q, k, v = (normal(i, (1, 5, 2, 4)) for i in range(3))
    ids = np.array([[1, 2, 0, 1, 3]])

    @jax.jit
    def f(q, k, v, table):
        out = attention(
            q, k, v, positions=np.arange(5), ids=ids, bias_table=table, window=1, scale=0.5,
            implementation="xla",
        )  # fmt: skip
        return jnp.sin(out).sum()

    arguments = (q, k, v, normal(3, (2, 4)))
    check_grads(f, arguments, order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)


biases = jax.jit(reference._biases, static_argnums=3)


@settings(deadline=None, max_examples=4)
@given(
    clip=st.integers(1, 3),
    windowed=st.booleans(),
    spread=st.integers(2, 9),
    seed=st.integers(0, 2**16),
)
def test_ids_between_integers_have_biases_between_theirs(clip, windowed, spread, seed):
    """Whole numbers give what integers give; half way between two is the mean of their biases."""
    q, k, v = (normal(seed + i, (2, 7, 2, 4)) for i in range(3))
    ids = np.random.default_rng(seed).integers(0, spread, (2, 7), np.int32)
    table, window = normal(seed, (2, 2 * clip + 2)), clip if windowed else None
    taken = lambda ids: attend(q, k, v, ids=ids, bias_table=table, window=window)  # noqa: E731
    assert relative_error(taken(ids.astype(np.float32)), taken(ids)) < 1e-6

    differences, keys = np.float32([[[0.5 - clip, 0.25, 0]]]), np.float32([[[2, 0.75, 0]]])
    between = biases(table, differences, keys, clip)
    expected = [
        (table[:, 0] + table[:, 1]) / 2,
        0.75 * table[:, clip] + 0.25 * table[:, clip + 1],
        table[:, -1],
    ]
    np.testing.assert_allclose(np.asarray(between)[0, :, 0], np.stack(expected, 1), rtol=1e-5)
    # Half way to the first difference outside, a window ends.
    q, k = q * 0, k * 0
    for difference, seen in ((clip + 0.4, True), (clip + 0.6, False)):
        ids = np.float32([[1, 1 + difference]])
        few = np.asarray(attend(q[:1, :2], k[:1, :2], v[:1, :2], ids=ids, window=clip))
        assert (np.abs(few[0, 1] - v[0, 1]).max() > 1e-3) == seen


def test_ids_have_a_gradient_on_the_plain_path():
    q, k, v = (normal(i, (1, 5, 2, 4)) for i in range(3))

    @jax.jit
    def f(ids, table):
        return jnp.sin(attention(q, k, v, ids=ids, bias_table=table, window=2)).sum()

    arguments = (np.float32([[1.2, 2.33, 1.71, 0.85, 2.64]]), normal(3, (2, 6)))
    check_grads(f, arguments, order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-3)
    with pytest.raises(ValueError, match="implementation = 'pallas': takes integer ids only"):
        attention(q, k, v, ids=arguments[0], window=1, implementation="pallas")


def test_dropout_keeps_the_asked_share_and_its_bits_are_uniform():
    @jax.jit
    def bits_of(key):
        rows, counters = np.arange(64)[:, None], np.arange(4096)[None]
        return dropout.dropout_bits(*dropout.dropout_seed(key), rows, counters)

    bits = np.asarray(bits_of(jax.random.key(0)))
    for rate in (0.1, 0.5, 0.9):
        dropped = (bits < dropout.dropout_threshold(rate)).mean()
        assert abs(dropped - rate) < 4 * (rate * (1 - rate) / bits.size) ** 0.5
    # Each of the 32 bits is fair, neighbours and rows are uncorrelated.
    ones = np.array([((bits >> i) & 1).mean() for i in range(32)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / bits.size**0.5
    centred = bits / 2**32 - 0.5
    for shifted in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, 64, 1)):
        assert abs((centred * shifted).mean() * 12) < 5 / bits.size**0.5
    other = np.asarray(bits_of(jax.random.key(1)))
    assert abs((centred * (other / 2**32 - 0.5)).mean() * 12) < 5 / bits.size**0.5


def test_the_same_key_drops_the_same_and_another_does_not():
    q = normal(0, (1, 16, 2, 16))
    run = lambda key: np.asarray(  # noqa: E731
        attend(q, q, q, dropout_rate=0.5, dropout_key=jax.random.key(key), implementation="pallas")
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
                    x, x, x, positions=np.arange(16), dropout_rate=0.2, dropout_key=step_key,
                    implementation=implementation,
                )  # fmt: skip
                return x, None

            return jax.lax.scan(body, q, jax.random.split(key, 2))[0].sum()

        return jax.jit(jax.grad(lambda q: jax.vmap(one)(q, keys).sum()))(q)

    with jax.default_matmul_precision("highest"):
        assert relative_error(loss("pallas"), loss("xla")) < 1e-5


def test_under_data_parallel_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q = normal(0, (2, 16, 2, 16))
    spec = jax.sharding.PartitionSpec("data")
    local = lambda q: attention(q, q, q, positions=np.arange(16), implementation="pallas")  # noqa: E731
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    gradient = jax.jit(jax.grad(lambda q: sharded(q).sum()))(q)
    alone = jax.jit(jax.grad(lambda q: local(q).sum()))(q)
    assert relative_error(gradient, alone) < 1e-6


MASKS = {
    "causal": {},
    "segments": {"segment_ids": np.array([[0] * 4 + [1] * 20, [2] * 24])},
    "window": {"ids": 1 + np.arange(48).reshape(2, 24) % 9, "window": 2},
    "neither": {"causal": False, "segment_ids": np.arange(48).reshape(2, 24) // 12 % 2},
}


@jax.jit
def where_it_shows(place):
    """By masks, the tokens that a change of one place's value changes, by plain code."""
    v = normal(2, (2, 24, 2, 16))
    changed = v + 100 * (jnp.arange(24) == place)[:, None, None]
    run = lambda v, given: attention(v * 0, v * 0, v, implementation="xla", **given)  # noqa: E731
    return {
        name: (run(v, given) != run(changed, given)).any((2, 3)) for name, given in MASKS.items()
    }


@partial(jax.jit, static_argnames=("implementation", "masks", "rate"))
def of_what_is_unseen(implementation, masks, rate, q, k, v, d_out, seeing):
    """Outputs, and the gradients of those of tokens that do not see."""
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "streamed":
            patch.setattr(api, "_whole_row", lambda *_: None)

        def projected(q, k, v):
            out = attention(
                q, k, v, positions=np.arange(24), dropout_rate=rate, dropout_key=jax.random.key(0),
                implementation="xla" if implementation == "xla" else "pallas", **MASKS[masks],
            )  # fmt: skip
            return (jnp.where(seeing[..., None, None], 0, out) * d_out).sum(), out

        return jax.grad(projected, (0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("implementation", with_slow(["xla", "pallas", "streamed"], "pallas"))
@settings(deadline=None, max_examples=4)
@given(
    masks=st.sampled_from(list(MASKS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    broken=st.sampled_from([np.nan, np.inf, -np.inf]),
    which=st.sampled_from([(0, 1, 2), (0,), (1,), (2,)]),
    rate=st.sampled_from([0.0, 0.3]),
    place=st.integers(0, 23),
)
def test_what_a_token_does_not_see_is_nothing_to_it(
    implementation, masks, dtype, broken, which, rate, place
):
    """Bit for bit, of outputs and gradients; and who sees a NaN of a value has NaN."""
    *qkv, d_out = (normal(i, (2, 24, 2, 16), dtype) for i in range(4))
    seeing = np.array(where_it_shows(place)[masks])
    seeing[:, place] = True
    d_out[seeing] = 0
    run = partial(of_what_is_unseen, implementation, masks, rate)
    gradients, out = jax.tree.map(np.asarray, run(*qkv, d_out, seeing))
    for i in which:
        qkv[i][:, place] = broken
    found_gradients, found = jax.tree.map(np.asarray, run(*qkv, d_out, seeing))
    np.testing.assert_array_equal(found[~seeing], out[~seeing])
    for value, expected in zip(found_gradients, gradients, strict=True):
        np.testing.assert_array_equal(value[~seeing], expected[~seeing])
    if 2 in which and rate == 0:
        assert not np.isfinite(found[seeing].astype(np.float32)).any()


def test_the_newest_token_does_not_look_behind_itself():
    q, k, v = normal(0, (2, 2, 4)), normal(1, (2, 6, 2, 4)), normal(2, (2, 6, 2, 4))
    at = np.array([2, 4])
    options = {"ids": None, "bias_table": None, "window": None, "clip": None, "scale": 0.5}
    newest = jax.jit(partial(reference.decode_attention, **options))
    out = newest(q, k, v, at)
    later = (np.arange(6) > at[:, None])[..., None, None]
    k, v = (np.where(later, np.float32(np.nan), x) for x in (k, v))
    np.testing.assert_array_equal(out, newest(q, k, v, at))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_integers_of_every_type_mean_the_same(implementation):
    """With ids of unsigned types, whose differences wrap around."""
    q = normal(0, (2, 8, 2, 16))
    numbers = np.random.default_rng(0).integers(0, 9, (2, 8))
    table = normal(1, (2, 6))

    def run(dtype):
        given = numbers.astype(dtype)
        out = attend(q, q, q, ids=given, bias_table=table, window=2, positions=given,
                     segment_ids=given // 5, implementation=implementation)  # fmt: skip
        return np.asarray(out)

    expected = run("int32")
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
        np.testing.assert_array_equal(run(dtype), expected)
    with jax.enable_x64(True):
        for dtype in ("int64", "uint64"):
            np.testing.assert_array_equal(run(dtype), expected)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [(0, 8, 2, 16), (2, 0, 2, 16), (2, 8, 0, 16)])
def test_nothing_gives_nothing(shape, implementation):
    q = np.zeros(shape, np.float32)
    f = lambda q: attend(q, q, q, implementation=implementation)  # noqa: E731
    assert f(q).shape == jax.grad(lambda q: f(q).sum())(q).shape == shape


BAD = {
    "shapes": ({"k": (2, 8, 2, 8)}, "q, k, v are"),
    "odd head": ({"shape": (2, 8, 2, 15)}, "head_dim = 15"),
    "positions": ({"positions": np.arange(7)}, "positions are"),
    "ids": ({"ids": np.zeros((2, 7), int), "window": 1}, "ids are"),
    "bias without ids": ({"bias_table": np.zeros((2, 4), np.float32)}, "need ids"),
    "bias shape": (
        {"ids": np.zeros((2, 8), int), "bias_table": np.zeros((2, 5), np.float32)}, "bias_table is"
    ),
    "window": (
        {"ids": np.zeros((2, 8), int), "bias_table": np.zeros((2, 4), "f"), "window": 3},
        "window = 3",
    ),
    "rate": ({"dropout_rate": 1.0}, "dropout_rate = 1.0"),
    "negative rate": ({"dropout_rate": -0.1}, "dropout_rate = -0.1"),
    "no key": ({"dropout_key": 3, "dropout_rate": 0.1}, "dropout_key = 3: expected one PRNG key"),
    "keys": (
        {"dropout_key": jax.random.split(jax.random.key(0), 2), "dropout_rate": 0.1},
        r"dropout_key = key<fry>\[2\]",
    ),
    "float positions": (
        {"positions": np.arange(8, dtype="f")}, "positions are float32: expected integers"
    ),
    "bool segments": (
        {"segment_ids": np.ones((2, 8), bool)}, "segment_ids are bool: expected integers"
    ),
    "segments for all rows": ({"segment_ids": np.zeros(8, int)}, r"segment_ids are \[8\]"),
    "half ids": (
        {"ids": np.ones((2, 8), jnp.bfloat16), "window": 1},
        "ids are bfloat16: expected integers or float32",
    ),
    "bool ids": ({"ids": np.ones((2, 8), bool), "window": 1}, "ids are bool"),
    "negative window": ({"ids": np.zeros((2, 8), int), "window": -1}, "window = -1"),
    "window by token": ({"ids": np.zeros((2, 8), int), "window": np.ones(8, "f")}, "window = "),
    "bias of integers": (
        {"ids": np.zeros((2, 8), int), "bias_table": np.zeros((2, 4), int)}, "bias_table is int"
    ),
    "head of nothing": ({"shape": (2, 8, 2, 0)}, "head_dim = 0"),
    "implementation": ({"implementation": "magic"}, "implementation = 'magic'"),
    "head too large": ({"shape": (2, 8, 2, 160), "implementation": "pallas"}, "up to 128, not 160"),
    "cudnn with dropout": (
        {"implementation": "cudnn", "dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        "no dropout",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit_are_named(case):
    options, said = BAD[case]
    options = dict(options)
    q = normal(0, options.pop("shape", (2, 8, 2, 16)))
    k = normal(1, options.pop("k")) if "k" in options else q
    with pytest.raises(ValueError, match=said):
        attention(q, k, q, **options)


def test_what_is_taken_where_nothing_is_asked_for(monkeypatch):
    """Plain `jnp` on a CPU; on a GPU what its table says, with the measurement."""
    if jax.default_backend() == "cpu":
        assert choose(64, 64, jnp.bfloat16, plain=True).implementation == "xla"
    key = tiles.head_key(64, 2)
    from_length = tiles.settings("h100", "cudnn_from", key)["length"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(targets, "_found", lambda: "h100")
    assert choose(64, 64, jnp.bfloat16, plain=True).implementation == "pallas"
    assert choose(from_length, 64, jnp.bfloat16, plain=False).implementation == "pallas"
    assert choose(from_length, 64, jnp.float32, plain=True).implementation == "pallas"
    assert choose(64, 160, jnp.bfloat16, plain=True).implementation == "xla"
    implementation, reason = choose(from_length, 64, jnp.bfloat16, plain=True)
    assert implementation == "cudnn"
    assert tiles.evidence("h100", "cudnn_from", key) in reason


def test_every_target_has_tiles_for_every_head():
    for target in targets.TARGETS:
        for head_dim in range(16, 129, 2):
            for item_size in (2, 4):
                for kernel in tiles.FLASH_KERNELS:
                    assert tiles.settings(target, kernel, tiles.head_key(head_dim, item_size))
                for length in (1, 24, 64, 128):
                    forward, backward = (
                        tiles.whole_row(target, k, length, head_dim, item_size, biased=False)
                        for k in tiles.FUSED_ROW_KERNELS
                    )
                    assert bool(forward) == bool(backward)
                    assert forward or length > 32 or item_size == 4


def test_the_table_of_tiles_is_written_as_it_is_read():
    assert tiles.as_text(tiles.table()) == tiles.FILE.read_text()

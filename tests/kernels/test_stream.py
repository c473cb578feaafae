"""The kernels around the residual stream against plain `jnp`: outputs and every gradient.

On a machine without a GPU the kernels run in interpret mode; with one, compiled for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    add_layer_norm,
    add_layer_norm_cross_entropy,
    dropout,
    gelu,
    targets,
)
from pallas_kernels.ops import linear

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
KEY = jax.random.key(7)


def normal(seed, shape, dtype="float32", scale=1.0, mean=0.0):
    drawn = np.random.default_rng(seed).standard_normal(shape) * scale + mean
    return jnp.asarray(drawn, jnp.float32).astype(dtype)


def assert_same(found, truth, dtype):
    """Leaf by leaf, relative to the size of the truth."""
    for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        value, expected = (np.asarray(x, np.float64) for x in (value, expected))
        assert np.isfinite(value).all()
        difference = np.linalg.norm(value - expected)
        assert difference <= TOLERANCE[dtype] * max(np.linalg.norm(expected), 1e-3)


def with_gradients(function, arguments, gradients):
    out, pull = jax.vjp(function, *arguments)
    return out, pull(jax.tree.map(lambda x, d: d.astype(x.dtype), out, gradients))


SHAPES = {
    "leading": st.sampled_from([(1,), (2, 7), (16,), (70,), (3, 64)]),
    "width": st.sampled_from([16, 24, 64, 128, 256]),
    "rate": st.sampled_from([0.0, 0.1, 0.5]),
    "dtype": st.sampled_from(list(TOLERANCE)),
    "seed": st.integers(0, 2**16),
}


@settings(deadline=None, max_examples=8)
@given(updated=st.booleans(), shifted=st.booleans(), **SHAPES)
def test_adding_and_norming(leading, width, rate, dtype, seed, updated, shifted):
    shape = (*leading, width)
    arguments = (
        normal(seed, shape, mean=0.5),
        normal(seed + 1, shape, dtype) if updated else None,
        normal(seed + 2, (width,), scale=0.2, mean=1.0),
        normal(seed + 3, (width,)) if shifted else None,
    )
    gradients = normal(seed + 4, shape), normal(seed + 5, shape)

    def run(implementation):
        def f(x, update, scale, shift):
            return add_layer_norm(
                x, update, scale, shift=shift, dropout_rate=rate, dropout_key=KEY,
                dtype=jnp.dtype(dtype), implementation=implementation,
            )  # fmt: skip

        return jax.jit(lambda: with_gradients(f, arguments, gradients))()

    assert_same(run("pallas"), run("xla"), dtype)


@settings(deadline=None, max_examples=8)
@given(vocabulary=st.sampled_from([2, 13, 16, 30]), **SHAPES)
def test_adding_and_scoring(leading, width, rate, dtype, seed, vocabulary):
    shape, draw = (*leading, width), np.random.default_rng(seed)
    arguments = (
        normal(seed, shape, mean=0.5),
        normal(seed + 1, shape, dtype),
        normal(seed + 2, (width,), scale=0.2, mean=1.0),
        normal(seed + 3, (vocabulary, width), dtype, scale=width**-0.5),
    )
    wanted = jnp.asarray(draw.integers(0, vocabulary, leading), jnp.int32)
    weights = jnp.asarray(draw.random(leading) * (draw.random(leading) < 0.6), jnp.float32)
    gradients = normal(seed + 4, shape), jnp.float32(1.7)

    def run(implementation):
        def f(x, update, scale, table):
            return add_layer_norm_cross_entropy(
                x, update, scale, table, wanted, weights, dropout_rate=rate, dropout_key=KEY,
                implementation=implementation,
            )  # fmt: skip

        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda: with_gradients(f, arguments, gradients))()

    assert_same(run("pallas"), run("xla"), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1,), (3, 1000), (4096,)])
def test_gelu(shape, dtype):
    u, d_out = normal(0, shape, dtype, scale=3), normal(1, shape, dtype)
    run = lambda i, *x: with_gradients(lambda u: gelu(u, i), x, d_out)  # noqa: E731
    exact = run("xla", u.astype(jnp.float32))
    assert_same(run("pallas", u), exact, dtype)


def test_gelu_far_from_zero():
    u = jnp.array([-200.0, -30.0, -6.0, 0.0, 6.0, 30.0, 200.0])
    out, pull = jax.vjp(lambda u: gelu(u, "pallas"), u)
    np.testing.assert_allclose(out, jax.nn.gelu(u, approximate=False), atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(7))[0], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)


def test_dropout_drops_each_number_on_its_own():
    x = jnp.ones((64, 32, 48))
    dropped = dropout.dropout(x, 0.25, KEY)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.75)
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.01)
    for axis in range(3):
        shares = kept.mean(axis=tuple({0, 1, 2} - {axis}))
        assert float(jnp.abs(shares - 0.75).max()) < 0.06
    other = dropout.dropout(x, 0.25, jax.random.key(8)) != 0
    assert float((kept == other).mean()) == pytest.approx(0.75**2 + 0.25**2, abs=0.01)


def test_the_same_bits_on_every_run_and_under_vmap():
    x, update = normal(0, (3, 40, 64)), normal(1, (3, 40, 64), "bfloat16")
    scale, keys = normal(2, (64,)), jax.random.split(KEY, 3)

    def one(x, update, key):
        return add_layer_norm(
            x, update, scale, dropout_rate=0.1, dropout_key=key, dtype=jnp.bfloat16,
            implementation="pallas",
        )  # fmt: skip

    together = jax.vmap(one)(x, update, keys)
    for i in range(3):
        for mine, theirs in zip(one(x[i], update[i], keys[i]), together, strict=True):
            assert (mine == theirs[i]).all()


SCALE, X = jnp.ones(16), jnp.ones((2, 16))
SCORED = (X, X, SCALE, jnp.ones((5, 16)), jnp.zeros(2, int), jnp.ones(2))


def scored(place, value):
    return lambda: add_layer_norm_cross_entropy(*SCORED[:place], value, *SCORED[place + 1 :])


BAD = {
    "implementation": (lambda: gelu(X, "magic"), "implementation = 'magic'"),
    "u": (lambda: gelu(jnp.arange(3)), "u is int32"),
    "x": (lambda: add_layer_norm(X.astype(jnp.bfloat16), None, SCALE), "x is bfloat16"),
    "update": (lambda: add_layer_norm(X, X[:1], SCALE), r"update is \[1, 16\]: expected \[2, 16\]"),
    "scale": (lambda: add_layer_norm(X, None, SCALE[:1]), r"scale is \[1\]: expected \[16\]"),
    "shift": (lambda: add_layer_norm(X, None, SCALE, shift=X), r"shift is \[2, 16\]"),
    "rate": (lambda: add_layer_norm(X, X, SCALE, dropout_rate=2.0), "dropout_rate = 2.0"),
    "key": (lambda: add_layer_norm(X, X, SCALE, dropout_key=jnp.ones(2)), "dropout_key = float32"),
    "dtype": (lambda: add_layer_norm(X, X, SCALE, dtype=jnp.int32), "dtype is int32"),
    "table": (scored(3, jnp.ones((5, 15))), r"table is \[5, 15\]: expected \[vocabulary, 16\]"),
    "wanted": (scored(4, jnp.zeros(2)), "wanted is float32: expected integers"),
    "one wanted": (scored(4, jnp.zeros(1, int)), r"wanted is \[1\]: expected \[2\]"),
    "weights": (scored(5, jnp.ones(())), r"weights are \[\]: expected \[2\]"),
    "matrix": (
        lambda: linear.linear(X, jnp.ones((8, 4)), dtype="float32"), r"weights is|weights are"
    ),
    "outer": (
        lambda: linear.mlp(X, jnp.ones((16, 8)), jnp.ones((4, 16)), dtype="float32"), "outer is"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit_are_named(case):
    call, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_nothing_gives_nothing(implementation, monkeypatch):
    none = jnp.zeros((0, 3, 16))
    assert gelu(none, implementation).shape == none.shape
    stream, normed = add_layer_norm(none, none, SCALE, implementation=implementation)
    assert stream.shape == normed.shape == none.shape
    _, score = add_layer_norm_cross_entropy(
        none, none, SCALE, SCORED[3], jnp.zeros((0, 3), int), jnp.ones((0, 3)),
        implementation=implementation,
    )  # fmt: skip
    assert score == 0
    monkeypatch.setattr(targets, "kernels_run", lambda: implementation == "pallas")
    wide = jnp.zeros((0, 64), jnp.bfloat16)
    assert linear.linear(wide, jnp.ones((64, 128)), dtype=jnp.bfloat16).shape == (0, 128)
    assert linear.mlp(wide, *2 * [jnp.ones((64, 64))], dtype=jnp.bfloat16).shape == (0, 64)

"""A block's products as kernels, and gradients of all blocks' matrices in one launch."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_slow
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import build, random_batch, random_weights
from test_stream import with_gradients

from pallas_kernels import targets
from pallas_kernels.ops import linear, matmul
from spak_jax import tasks
from spak_jax.config import read_config
from spak_jax.training.step import loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

SIZES = st.sampled_from([64, 128, 192])
SUPPORTS = linear.supports


@pytest.fixture(scope="module", autouse=True)
def taken():
    """The kernels run wherever sizes allow, interpreted where there is no GPU, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "supports", lambda tokens, *sizes: tokens % 128 == 0)
        yield patch


@settings(deadline=None, max_examples=6)
@given(st.sampled_from([(128,), (2, 64), (3, 128)]), SIZES, SIZES, st.integers(0, 2**31 - 1))
def test_a_product_and_its_gradients(leading, inputs, outputs, seed):
    draw = drawer(seed)
    kernels = partial(linear.linear, dtype=jnp.float32)
    given = draw(*leading, inputs), draw(inputs, outputs)
    assert_same(kernels, lambda x, weights: x @ weights, given, draw(*leading, outputs))


@settings(deadline=None, max_examples=3)
@given(st.sampled_from([(128,), (4, 64)]), SIZES, SIZES, st.integers(0, 2**31 - 1))
def test_an_mlp_and_its_gradients(leading, width, hidden, seed):
    draw = drawer(seed)

    def plain(x, inner, outer):
        return jax.nn.gelu(x @ inner, approximate=False) @ outer

    def kernels(*given):
        return linear.mlp(*given, dtype=jnp.float32)

    arguments = (
        draw(*leading, width),
        draw(width, hidden) / width**0.5,
        draw(hidden, width) / hidden**0.5,
    )
    truth = assert_same(kernels, plain, arguments, draw(*leading, width))
    # What is not differentiated is computed by other kernels.
    np.testing.assert_allclose(jax.jit(kernels)(*arguments), truth, atol=1e-4)


@settings(deadline=None, max_examples=5)
@given(
    st.integers(1, 3),
    SIZES,
    SIZES,
    st.sampled_from([128, 384]),
    st.integers(0, 2**31 - 1),
)
def test_gradients_of_several_matrices(count, inputs, outputs, tokens, seed):
    draw = drawer(seed)
    pairs = [
        linear.DeferredWeightGrad(draw(tokens, inputs), draw(tokens, outputs)) for _ in range(count)
    ]
    gradients = jax.jit(linear.weight_grads)(pairs)
    for made, (x, d_y) in zip(np.sum(gradients, 1), pairs, strict=True):
        np.testing.assert_allclose(made, x.T @ d_y, atol=1e-4)


@pytest.mark.parametrize("inner", [512, 1024])
def test_long_sums_leave_nothing_out(inner):
    draw = drawer(inner)
    # Later channels weigh more: a sum that ends early is far off.
    a = draw(128, inner) * (1 + np.arange(inner, dtype=np.float32) // 64)
    b, by = draw(inner, 128) / inner, draw(128, 128)
    on_cpu = jax.default_backend() == "cpu"

    @jax.jit
    def by_kernels(a, b, by):
        return (
            matmul.matmul(a, b, interpret=on_cpu),
            matmul.matmul(a, b.T, transpose_b=True, interpret=on_cpu),
            matmul.matmul_mul(a, b.T, by, interpret=on_cpu),
            matmul.matmul_gelu(a, b, slopes=False, interpret=on_cpu)[0],
        )

    @jax.jit
    def plain(a, b, by):
        product = a @ b
        return product, product, product * by, jax.nn.gelu(product, approximate=False)

    for made, expected in zip(by_kernels(a, b, by), plain(a, b, by), strict=True):
        np.testing.assert_allclose(made, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"dtype": jnp.float16}, True),
        ({"tokens": matmul.MOST_TOKENS, "inputs": 64, "outputs": matmul.LONGEST}, True),
        ({"dtype": jnp.float32}, False),
        ({"tokens": 0}, False),
        ({"tokens": 8192 + 64}, False),
        ({"tokens": matmul.MOST_TOKENS + 128}, False),
        ({"inputs": 96}, False),
        ({"outputs": 13}, False),
        ({"inputs": matmul.LONGEST + 64}, False),
        ({"outputs": matmul.LONGEST + 64}, False),
    ],
)
def test_which_products_are_kernels(changed, taken, monkeypatch):
    sizes = {"tokens": 8192, "inputs": 256, "outputs": 768, "dtype": jnp.bfloat16} | changed
    for runs in (True, False):
        monkeypatch.setattr(targets, "kernels_run", lambda: runs)  # noqa: B023
        assert SUPPORTS(**sizes) == (taken and runs)


def test_bfloat16_is_added_up_in_float32():
    draw = drawer(0)
    x, weights = draw(128, 192), draw(192, 64)
    made = jax.jit(partial(linear.linear, dtype=jnp.bfloat16))(x, weights)
    assert made.dtype == jnp.bfloat16
    made, x, weights = (np.asarray(y, jnp.bfloat16).astype(np.float32) for y in (made, x, weights))
    # Half a unit in the last of bfloat16's eight bits.
    np.testing.assert_allclose(made, x @ weights, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("name", with_slow(["loop12", "gpt12"], "loop12"))
def test_a_training_step_has_the_same_gradients(name, taken):
    """With all gradients of matrices made at once, as with no kernel at all."""
    layers = "layers" if name == "gpt12" else "loops"
    config = small(name, f"model.{layers}=2")
    weights = weights_of(config)
    kernels = jax.jit(value_and_gradient(config))(weights)
    taken.setattr(linear, "supports", lambda *sizes: False)
    plain = jax.jit(value_and_gradient(config))(weights)
    taken.setattr(linear, "supports", lambda tokens, *sizes: tokens % 128 == 0)
    for one, other in zip(*map(jax.tree.leaves, (kernels, plain)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 + 2e-5 * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize("most", [2 * 128, 128])
def test_seeds_side_by_side_have_their_own_gradients(most, monkeypatch):
    """Whether the products of two are kernels, as those of one, or XLA's."""
    monkeypatch.setattr(matmul, "MOST_OF_A_PRODUCT", most)
    several, alone = two_seeds()
    together = jax.jit(jax.vmap(value_and_gradient(TWO_LOOPS)))(several)
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@cache
def two_seeds():
    """Weights of two models side by side, and what one program makes of each alone."""
    one, other = weights_of(TWO_LOOPS), weights_of(TWO_LOOPS, seed=1)
    stack = partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    run = jax.jit(value_and_gradient(TWO_LOOPS))
    return stack(one, other), stack(run(one), run(other))


def small(name: str, *overrides: str):
    sizes = ["model.width=64", "model.heads=2", 'model.dtype="float32"', "train.batch=2"]
    return read_config(Path(f"configs/{name}.toml"), [*sizes, *overrides])


TWO_LOOPS = small("loop12", "model.loops=2")


def weights_of(config, seed: int = 0) -> nnx.State:
    weights = random_weights(config, seed)
    # As large as initial ones, but for scales: rounding grows with the loops.
    return nnx.state(
        build(config, {k: w if k.endswith("scale") else w / 5 for k, w in weights.items()})
    )


def value_and_gradient(config):
    """Of the training loss, with dropout, by weights."""
    definition = nnx.graphdef(build(config, random_weights(config)))
    batch = random_batch(rows=config.train.batch, length=64)

    def objective(weights):
        network = nnx.merge(definition, weights)
        return loss(network, batch, tasks.of(config.data), jax.random.key(3), 0.5)

    return jax.value_and_grad(objective)


def drawer(seed: int):
    random = np.random.default_rng(seed)
    return lambda *shape: random.standard_normal(shape, np.float32)


def assert_same(kernels, plain, given, d_out):
    """Outputs and gradients; returns the plain output."""
    found, expected = (jax.jit(partial(with_gradients, f))(given, d_out) for f in (kernels, plain))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
    return expected[0]

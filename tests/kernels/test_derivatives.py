"""Derivatives of every kind and order through kernels, as through plain `jnp`.

Kernels run in interpret mode, and what a GPU would run is lowered for one that is not there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_turn, with_slow
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from test_compile import TRITON
from test_looped import FRONTIER, network_of, texts

from pallas_kernels import (
    add_layer_norm,
    add_layer_norm_cross_entropy,
    attention,
    derivatives,
    gelu,
    targets,
)
from pallas_kernels.ops import linear as products
from pallas_kernels.ops.attention import api
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

pytestmark = pytest.mark.usefixtures("exact_products")

KEY = jax.random.key(5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attending(implementation, rate, odd):
    length, masks = (3, True) if odd else (16, False)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, length)), jnp.int32)

    def f(qkv, table):
        return attention(
            qkv, positions=jnp.arange(length), ids=ids if masks else None,
            bias_table=table if masks else None, window=1 if masks else None,
            dropout_rate=rate, dropout_key=KEY, implementation=implementation,
        )  # fmt: skip

    return f, (normal(1, 2, length, 3, 2, 4), normal(2, 2, 4))


def adding_and_norming(implementation, rate, odd):
    def f(x, update, scale, shift):
        return add_layer_norm(
            x, update, scale, shift=shift, dropout_rate=rate, dropout_key=KEY,
            implementation=implementation,
        )  # fmt: skip

    width = 5 if odd else 16
    return f, (normal(1, 3, width), normal(2, 3, width), normal(3, width), normal(4, width))


def adding_and_scoring(implementation, rate, odd):
    def f(x, update, scale, table, weights):
        return add_layer_norm_cross_entropy(
            x, update, scale, table, jnp.array([1, 0, 4]), weights, dropout_rate=rate,
            dropout_key=KEY, implementation=implementation,
        )  # fmt: skip

    # Logits near one: the sine of a loss of 60 turns its last bit into 1e-4 of a derivative.
    arguments = normal(1, 3, 16), normal(2, 3, 16), normal(3, 16), normal(4, 5, 16) / 4
    return f, (*arguments, normal(5, 3))


def gelus(implementation, rate, odd):
    return lambda u: gelu(u, implementation), (normal(1, 1 if odd else 16),)


def multiplying(implementation, rate, odd):
    """A product and an MLP; kernels for any number of tokens."""
    x, (matrix, inner, outer) = normal(1, 128, 64), normal(2, 3, 64, 64)

    def f(x, matrix, inner, outer):
        kernels = implementation == "pallas"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "supports", lambda *_: kernels)
            x = products.linear(x, matrix, dtype=jnp.float32)
            return products.mlp(x, inner, outer, dtype=jnp.float32)

    return f, (x, matrix / 8, inner / 8, outer / 8)


OPERATIONS = [attending, adding_and_norming, adding_and_scoring, gelus, multiplying]


def along(gradients, direction):
    return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))


def gradient(f, arguments, _):
    return jax.grad(f, tuple(range(len(arguments))))(*arguments)


def of_each_alone(f, arguments, _):
    """Also of what no backward kernel is for, such as the weights of scores."""
    return [jax.grad(f, i)(*arguments) for i in range(len(arguments))]


def forward_mode(f, arguments, direction):
    return jax.jvp(f, arguments, direction)


def of_a_gradient(f, arguments, direction):
    wanted = tuple(range(len(arguments)))
    return jax.grad(lambda *x: along(jax.grad(f, wanted)(*x), direction), wanted)(*arguments)


def forward_of_a_gradient(f, arguments, direction):
    """A column of the Hessian."""
    return jax.jvp(jax.grad(f, tuple(range(len(arguments)))), arguments, direction)


def of_forward_mode(f, arguments, direction):
    return jax.grad(lambda *x: jax.jvp(f, x, direction)[1], tuple(range(len(arguments))))(
        *arguments
    )


def third(f, arguments, direction):
    return forward_mode(lambda *x: jax.jvp(f, x, direction)[1], arguments, direction)


def recomputed(f, arguments, direction):
    return of_a_gradient(jax.checkpoint(f), arguments, direction)


def several(f, arguments, direction):
    """Side by side, one argument shared."""
    both = [jnp.stack([x, 2 * x], axis=-1) for x in arguments[1:]]

    def total(shared, *rest):
        return jax.vmap(f, (None, *[-1] * len(rest)))(shared, *rest)

    if not both:
        return jax.vmap(jax.grad(f))(jnp.stack([arguments[0], 2 * arguments[0]]))
    return jax.jacrev(total, tuple(range(len(arguments))))(arguments[0], *both)


def in_a_scan(f, arguments, direction):
    """Twice, where not all of the loop is known beforehand."""

    def scanned(*arguments):
        step = lambda total, by: (total + f(*(by * x for x in arguments)), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, jnp.array([1.0, 0.5]))[0]

    return of_a_gradient(scanned, arguments, direction)


KINDS = [
    gradient, of_each_alone, several, forward_mode, of_a_gradient, forward_of_a_gradient,
    of_forward_mode, third, recomputed, in_a_scan,
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(deadline=None, max_examples=3)
@given(kind=st.sampled_from(KINDS), rate=st.sampled_from([0.0, 0.3]), odd=st.booleans())
def test_derivatives_are_those_of_plain_code(operation, kind, rate, odd):
    found, truth = (derived(operation(i, rate, odd), kind) for i in ("pallas", "xla"))
    for value, expected in zip(*map(jax.tree.leaves, (found, truth)), strict=True):
        size = max(1e-2, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, atol=5e-5 * size)


def derived(operation, kind):
    function, arguments = operation

    def scalar(*arguments):
        return sum(jnp.sin(1.3 * x).sum() for x in jax.tree.leaves(function(*arguments)))

    direction = tuple(normal(9 + i, *x.shape) for i, x in enumerate(arguments))
    return jax.jit(lambda: kind(scalar, arguments, direction))()


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_argument_is_traced_while_the_others_are_numpy_arrays(operation, implementation):
    function, arguments = operation(implementation, 0.0, True)
    shapes = jax.eval_shape(function, *arguments)
    for i, argument in enumerate(arguments):
        around = lambda x, i=i: function(*arguments[:i], x, *arguments[i + 1 :])  # noqa: E731
        assert jax.eval_shape(around, argument) == shapes


@pytest.mark.parametrize(
    "kind", with_slow([gradient, forward_mode, of_a_gradient, in_a_scan], of_a_gradient)
)
def test_outside_of_jit_too(kind):
    def derived_of(implementation):
        function, arguments = adding_and_norming(implementation, 0.0, True)
        direction = tuple(normal(9 + i, *x.shape) for i, x in enumerate(arguments))
        return kind(lambda *x: jnp.sin(function(*x)[1]).sum(), arguments, direction)

    found, truth = map(derived_of, ("pallas", "xla"))
    for value, expected in zip(*map(jax.tree.leaves, (found, truth)), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-4)


def test_what_only_goes_backward_is_differentiated_on_by_plain_code():
    """As cuDNN's attention, which JAX neither pushes forward nor differentiates twice."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    def backward(x, d):
        return (jax.pure_callback(np.multiply, x, 3 * x * x, d, vmap_method="broadcast_all"),)

    cube.defvjp(lambda x: (x**3, x), backward)
    run = lambda x, *_: cube(x)  # noqa: E731
    f = derivatives.differentiable(run, lambda x, *_: x**3, gradient=derivatives.by_vjp(run))
    one = lambda x: f(x, (), None)  # noqa: E731
    np.testing.assert_allclose(jax.grad(one)(2.0), 12.0)
    np.testing.assert_allclose(jax.grad(jax.grad(one))(2.0), 12.0)
    np.testing.assert_allclose(jax.jvp(one, (2.0,), (1.0,))[1], 12.0)
    np.testing.assert_allclose(jax.vmap(jax.hessian(one))(jnp.arange(3.0)), [0.0, 6.0, 12.0])


def loss(network, how, tokens, thresholds):
    inputs = {"position_ids": ADDITION.position_ids(tokens)}
    if how == "launched":
        logits, _ = network.fused_forward(tokens, thresholds, **inputs)
    elif thresholds is None:
        logits = network(tokens, **inputs)
    else:
        logits, _ = network.halting_logits(tokens, thresholds, **inputs)
    return jnp.sin(logits).mean()


@pytest.mark.parametrize(("kind", "halting"), in_turn(["swiglu", "frontier"], [False, True]))
def test_the_gradient_of_a_call_in_one_launch(kind, halting):
    """As of the scanned model, of every weight; also of logits where tokens halt."""
    frontier = FRONTIER | {"width": 24, "heads": 2, "hidden": 40}
    network = network_of(**(frontier if kind == "frontier" else {"mlp": "swiglu"}))
    tokens, thresholds = texts(3, 12), jnp.full((3, 12), 0.5) if halting else None
    gradient = nnx.jit(nnx.grad(loss), static_argnums=1)
    found, truth = (gradient(network, how, tokens, thresholds) for how in ("launched", "scanned"))
    for value, expected in zip(*map(jax.tree.leaves, (found, truth)), strict=True):
        size = np.abs(expected).max()
        assert size > 0
        np.testing.assert_allclose(value, expected, atol=1e-4 * size)


def a_call(network, tokens):
    return jnp.sin(network(tokens)).mean()


def a_training_loss(network, tokens):
    weights = jnp.ones(tokens.shape)
    return network.supervised_losses(tokens, tokens, weights, key=KEY).sum()


@pytest.mark.parametrize(("order", "function"), in_turn([0, 1, 2], [a_call, a_training_loss]))
def test_models_lower_for_a_gpu(function, order):
    """To Triton's code, differentiated never, once and twice; a mere call to one launch."""
    network = network_of(width=64, heads=4, loops=2, dtype="bfloat16")
    network.block.attention_implementation = None
    definition, weights = nnx.split(network)
    tokens = jax.ShapeDtypeStruct((128, 64), jnp.int32)

    def objective(weights, tokens):
        return function(nnx.merge(definition, weights), tokens)

    def program(weights, tokens):
        with targets.compiling_for("h100"):
            assert nnx.merge(definition, weights).supports_fused(tokens)
            if order == 0:
                return objective(weights, tokens)
            if order == 1:
                return jax.value_and_grad(objective)(weights, tokens)
            gradient = jax.grad(objective)
            return jax.jvp(lambda x: gradient(x, tokens), (weights,), (weights,))

    exported = export.export(
        jax.jit(program),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(TRITON)],
    )(weights, tokens)
    launches = exported.mlir_module().count(TRITON)
    assert launches == 1 if (function, order) == (a_call, 0) else launches > 10


def test_attention_by_cudnn_has_derivatives_of_every_kind(monkeypatch):
    """The wrapper around cuDNN gives what plain code gives."""
    q = normal(0, 1, 8, 2, 8)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, is_causal, scale, implementation: attention(
            q, k, v, causal=is_causal, scale=scale, implementation="xla"
        ),
    )
    through = lambda q: jnp.sin(api._cudnn((q, q, q), (), (True, 0.3))).sum()  # noqa: E731
    plain = lambda q: jnp.sin(attention(q, q, q, scale=0.3, implementation="xla")).sum()  # noqa: E731
    for kind in (jax.grad, lambda f: lambda q: jax.jvp(jax.grad(f), (q,), (q,))[1]):
        np.testing.assert_allclose(jax.jit(kind(through))(q), jax.jit(kind(plain))(q), atol=1e-5)

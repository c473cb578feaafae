"""What is fused equals the equations, and is for `Block` itself: other classes go as written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_slow
from flax import nnx
from jax import export
from random_models import (
    GPT,
    LENGTH,
    LOOP,
    build,
    error,
    make_config,
    random_batch,
    random_weights,
)

from pallas_kernels import targets
from pallas_kernels.ops import looped
from spak_jax import models
from spak_jax.evaluation import generate
from spak_jax.models import fused, kv_cache
from spak_jax.models.block import Block
from spak_jax.models.fused import Stream
from spak_jax.positions.base import PositionInputs
from spak_jax.registry import BLOCKS
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

pytestmark = pytest.mark.usefixtures("exact_products")

KEY = jax.random.key(5)
# What a kernel is in a program for a GPU.
TRITON = "__gpu$xla.gpu.triton"
WINDOWED = {"positions": "coupled-bias", "window": True, "max_relative_distance": 2}
ARCHITECTURES = {
    "gpt": GPT | {"dropout": 0.2},
    "gpt, gated": GPT | {"mlp": "swiglu"} | WINDOWED,
    "loop": LOOP | {"dropout": 0.2},
    "loop, injected": LOOP | {"inject_input": True, "normalize_state": True} | WINDOWED,
    "learned": LOOP | {"positions": "learned", "window": True},
    "answers fed back": LOOP
    | {"inject_input": True, "normalize_state": True, "answer_feedback": True, "dropout": 0.2},
    "warmed up": LOOP | {"shared_step": True, "no_grad_warmup_loops": 2},
}
# Dropout, gates, windows, stacks and loops are among them.
KEPT = "loop", "gpt, gated", "learned", "answers fed back"


@pytest.fixture(autouse=True)
def written_out(monkeypatch):
    """`Block` under another name: a subclass, of which nothing is known."""
    known = {name: BLOCKS.get(name) for name in BLOCKS.names()}
    monkeypatch.setattr(BLOCKS, "_classes", known)

    @BLOCKS.register("written-out")
    class WrittenOut(Block):
        attention_weights = Block.attention_weights

    return WrittenOut


def both(**architecture):
    """A model of known blocks and one of the others, of the same weights."""
    weights = random_weights(make_config(**architecture))
    return [
        build(make_config(**architecture, block=name), weights)
        for name in ("transformer", "written-out")
    ]


@pytest.mark.parametrize("name", with_slow(ARCHITECTURES, *KEPT))
def test_training_is_that_of_the_equations(name):
    batch = random_batch()
    tokens, targets, weights = (jnp.asarray(x) for x in batch)

    @nnx.jit
    def losses_and_gradient(network):
        position_ids = ADDITION.position_ids(tokens)

        def total(network):
            losses = network.supervised_losses(
                tokens,
                targets,
                weights.astype(jnp.float32),
                position_ids=position_ids,
                key=KEY,
                progress=0.1,
            )
            return losses.sum(), losses

        return nnx.value_and_grad(total, has_aux=True)(network)

    ((_, found), found_gradient), ((_, expected), gradient) = (
        losses_and_gradient(network) for network in both(**ARCHITECTURES[name])
    )
    assert error(found, expected) < 1e-6
    for value, wanted in zip(*map(jax.tree.leaves, (found_gradient, gradient)), strict=True):
        assert error(value, wanted) < 1e-5


@pytest.mark.parametrize("name", with_slow(ARCHITECTURES, *KEPT))
def test_inference_is_that_of_the_equations(name):
    tokens = jnp.asarray(random_batch().tokens)
    known, other = both(**ARCHITECTURES[name])

    @nnx.jit
    def all_ways(network):
        given = {"position_ids": ADDITION.position_ids(tokens)}
        logits = network(tokens, **given)
        if isinstance(network, models.GPT):
            return (logits,), None
        thresholds = jnp.full(tokens.shape, 0.6)
        halted, steps = network.halting_logits(tokens, thresholds, **given)
        return (logits, halted, *network.forward_with_intermediates(tokens, **given)), steps

    (found, steps), (expected, taken) = map(all_ways, (known, other))
    np.testing.assert_array_equal(steps, taken)
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < 1e-6


def test_the_same_bits_without_an_injected_input():
    """With one, numbers are added in another order."""
    block, other = (network.block for network in both(**LOOP | {"dropout": 0.3}))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, LENGTH, 32), np.float32))
    inputs, keys = PositionInputs(rope_positions=jnp.arange(LENGTH)), jax.random.split(KEY, 4)
    stream = fused.apply_block(block, fused.first_stream(block, x, x.dtype), inputs, keys)
    found = fused.apply_pending(stream, keys[-1], 0.3)
    np.testing.assert_array_equal(found, other(x, position_inputs=inputs, keys=keys[1:]))
    assert stream.pending_residual is not None
    stream = fused.apply_block(other, fused.first_stream(other, x, x.dtype), inputs, keys)
    np.testing.assert_array_equal(stream.x, found)
    assert stream.pending_residual is None


@pytest.fixture
def no_fusing(monkeypatch):
    """Every fused way is there for the asking, and asking for one fails."""

    def asked(*_, **__):
        raise AssertionError("a fused way was taken")

    for name in ("add_layer_norm", "looped_block", "attention_inputs", "add_attention"):
        monkeypatch.setattr(fused, name, asked)
    monkeypatch.setattr(fused.DeferredWeightGrad, "zeros", asked)
    monkeypatch.setattr(looped, "supports_fused", lambda *_, **__: True)


@pytest.mark.parametrize("kind", [GPT, LOOP], ids=["gpt", "loop"])
def test_other_blocks_take_no_fused_way(kind, no_fusing):
    tokens = jnp.asarray(random_batch().tokens)
    known, other = both(**kind)

    def everything(network):
        network(tokens)
        network(tokens, key=KEY)
        nnx.grad(lambda x: x.supervised_losses(tokens, tokens, jnp.ones(tokens.shape)).sum())(
            network
        )
        if isinstance(network, models.LoopLM):
            network.halting_logits(tokens, jnp.full(tokens.shape, 0.6))
            network.forward_with_intermediates(tokens)

    # Ways are asked for when a program is traced: none need be compiled.
    nnx.eval_shape(everything, other)
    with pytest.raises(AssertionError, match="a fused way"):
        nnx.eval_shape(everything, known)


def test_other_blocks_are_refused_where_there_is_one_way_alone():
    _, other = both(**LOOP)
    tokens = jnp.asarray(random_batch().tokens)
    assert not other.supports_fused(tokens)
    with pytest.raises(ValueError, match="WrittenOut: one launch knows Block alone"):
        other.fused_forward(tokens)
    with pytest.raises(ValueError, match="WrittenOut: a cache serves Block alone"):
        kv_cache.prefill(other, tokens)
    for name, decoder in (
        ("transformer", generate.WITH_CACHE),
        ("written-out", generate.WITHOUT_CACHE),
    ):
        config = make_config(**LOOP, block=name)
        assert generate.pick_decoder(config.model, (4, 20), None) == decoder


def test_weights_of_attention_are_shown_where_the_class_says_that_they_are_its_own(written_out):
    _, other = both(**LOOP)
    tokens = jnp.asarray(random_batch().tokens)
    assert other.forward_with_intermediates(tokens)[1] is not None
    del written_out.attention_weights
    assert other.forward_with_intermediates(tokens)[1] is None


def test_other_blocks_lower_for_a_gpu_to_more_than_one_launch():
    """Those of attention; a mere call of known blocks is one."""
    tokens = jax.ShapeDtypeStruct((128, 64), jnp.int32)
    launches = []
    for network in both(kind="loop", loops=2, width=64, heads=4, dtype="bfloat16"):
        definition, weights = nnx.split(network)

        def program(weights, tokens):
            with targets.compiling_for("h100"):
                return nnx.merge(definition, weights)(tokens)  # noqa: B023

        exported = export.export(
            jax.jit(program),
            platforms=["cuda"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(TRITON)],
        )(weights, tokens)
        launches.append(exported.mlir_module().count(TRITON))
    assert launches[0] == 1 < launches[1]


def test_a_stream_with_nothing_pending_is_the_stream():
    x = jnp.ones((2, 3, 4))
    assert fused.apply_pending(Stream(x), None, 0.5) is x

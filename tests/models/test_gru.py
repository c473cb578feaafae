"""The GRU against its equations in plain NumPy, and operations against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from random_models import ROUNDING, build, error, random_weights

from spak_jax import tasks
from spak_jax.command_line import InputError
from spak_jax.config import parse_config
from spak_jax.evaluation.forward import require_looped
from spak_jax.models import flops
from spak_jax.models.gru import NEWLINE
from spak_jax.registry import TASKS
from spak_jax.training import runs

IN_PLACE = {
    "task": "parity", "answers": "in-place", "max_length": 6, "bridge_fraction": 0.0,
    "row_length": 8, "layout": "single", "examples": 0,
}  # fmt: skip


def gru_config(**model):
    sizes = {"kind": "gru", "width": 6, "layers": 2, "dtype": "float32", "dropout": 0.0}
    values = tiny_config(data=IN_PLACE).model_dump(mode="json")
    return parse_config(values | {"model": sizes | model}, "test")


def states(weights, name, layer, x, ends):
    """The states of one cell over `[length, width]`, float64."""
    of = lambda part: weights[f"layers.{name}.{part}"][layer].astype(np.float64)  # noqa: E731
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    inner, bias, outer = of("dense_i.kernel"), of("dense_i.bias"), of("dense_h.kernel")
    h, found = np.zeros(len(outer)), []
    for token, end in zip(x, ends, strict=True):
        i_r, i_z, i_n = np.split(token @ inner + bias, 3)
        h_r, h_z, h_n = np.split(h @ outer, 3)
        r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
        h = (1 - z) * np.tanh(i_n + r * h_n) + z * h
        h = 0 * h if end else h
        found.append(h)
    return np.array(found)


@pytest.mark.parametrize("causal", [True, False])
def test_logits_and_losses_are_those_of_the_equations(causal):
    config = gru_config(causal=causal)
    weights = random_weights(config)
    tokens = np.random.default_rng(0).integers(1, 4, (3, 8))
    tokens[1, 5:] = NEWLINE
    embedding = weights["embedding.embedding"].astype(np.float64)
    expected = []
    for row in tokens:
        x, never = embedding[row], np.zeros(len(row), bool)
        for layer in range(2):
            parts = [states(weights, "forwards", layer, x, never)]
            if not causal:
                back = states(weights, "backwards", layer, x[::-1], row[::-1] == NEWLINE)
                parts.append(back[::-1])
            x = np.concatenate(parts, -1)
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        expected.append(normed * weights["final_norm.scale"] @ embedding.T)
    network = build(config, weights)

    @nnx.jit
    def found_of(network, tokens):
        losses = network.supervised_losses(tokens, tokens, jnp.ones(tokens.shape))
        return network(tokens), network(tokens[1:2, :5]), losses

    logits, shorter, losses = found_of(network, tokens)
    assert error(logits, expected) < ROUNDING
    # What fills a row up changes nothing before it.
    assert error(shorter[0], logits[1, :5]) < ROUNDING
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)
    assert losses.shape == (1,) and float(losses[0]) == pytest.approx(-chosen.sum(), rel=1e-5)


def test_every_task_ends_with_the_newline_that_the_gru_knows():
    assert {TASKS.get(name)("symbol-by-symbol").end for name in TASKS.names()} == {NEWLINE}


def test_a_longer_training_goes_on_where_a_shorter_one_ended():
    """What a longer one changes is asked of the position scheme, of which a GRU has none."""
    config = gru_config()
    longer = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": 2 * config.train.steps})}
    )
    assert runs._difference(config, longer, config.train.steps) is None


def test_what_is_not_for_a_gru_is_refused():
    with pytest.raises(InputError, match="tiny is a GRU of 2 layers; only a looped model"):
        require_looped(gru_config(), "--loops")
    with pytest.raises(InputError, match="unknown key model.heads"):
        gru_config(heads=2)
    with pytest.raises(InputError, match=r"model.width = 7 must be even"):
        gru_config(width=7, causal=False)


def test_operations_are_counted_by_hand():
    vocabulary = len(tasks.of(gru_config().data).vocabulary)
    gru = gru_config()
    assert flops.weights_of_a_layer(gru) == 2 * 6 * 18
    # A problem of 5 bits has 6 tokens.
    assert flops.operations_a_problem(gru, 5) == 6 * 2 * (2 * 2 * 6 * 18 + 6 * vocabulary)
    assert flops.operations_a_step(gru) == 3 * 8 * 8 * 2 * (2 * 2 * 6 * 18 + 6 * vocabulary)
    more = {"shared_step": True, "no_grad_warmup_loops": 5, "supervised_loops": 2}
    looped = tiny_config(data=IN_PLACE, model=more)
    block = 2 * 12 * 16**2
    of_loop = lambda length: block + 2 * 16 * length  # noqa: E731
    readout = 2 * 16 * vocabulary
    assert flops.operations_a_problem(looped, 5, 7) == 6 * (7 * of_loop(6) + readout)
    step = 3 * (3 * of_loop(8) + 2 * readout) + 2.5 * of_loop(8)
    assert flops.operations_a_step(looped) == 8 * 8 * step

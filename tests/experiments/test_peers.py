"""What looped models are compared with is fair: as many operations, or as many weights."""

import pytest

from spak_jax.config import read_config
from spak_jax.config_files import specification_file
from spak_jax.experiments.peers import peers
from spak_jax.experiments.studies import DEPTH
from spak_jax.models import flops, parameters_of


@pytest.mark.parametrize("name", DEPTH)
def test_peers_cost_as_many_operations_or_have_as_many_weights(name):
    config = read_config(specification_file(name))
    deep, narrow, gru = peers(config)
    operations = flops.operations_a_step(config)
    one_less = deep.model_copy(
        update={"model": deep.model.model_copy(update={"layers": deep.model.layers - 1})}
    )
    assert flops.operations_a_step(one_less) < operations <= flops.operations_a_step(deep)
    assert deep.model.width == config.model.width
    for same in (narrow, gru):
        assert parameters_of(same) == pytest.approx(parameters_of(config), rel=0.03)
    slower = {"learning_rate": config.train.learning_rate / 4}
    for peer, train in (
        (deep, config.train.model_copy(update=slower)), (narrow, config.train), (gru, config.train)
    ):  # fmt: skip
        assert (peer.data, peer.train) == (config.data, train)
        assert peer.model.causal == config.model.causal
    assert [peer.system for peer in (deep, narrow, gru)] == [
        config.system.replace("LoopLM", "GPT").replace(")", ", as many operations)"),
        config.system.replace("LoopLM", "GPT").replace(")", ", as many parameters)"),
        config.system.replace("LoopLM", "GRU"),
    ]


def test_blocks_of_a_stack_have_positions_and_windows_as_the_looped_one():
    config = read_config(specification_file("parity"))
    for peer in peers(config)[:2]:
        for key in ("positions", "window", "max_relative_distance", "heads", "init_std", "dtype"):
            assert getattr(peer.model, key) == getattr(config.model, key)

"""What a looped model is fairly compared with: trained on the same problems, by the same recipe,
with as many operations or as many weights."""

import bisect
from collections.abc import Callable
from typing import Any

from spak_jax import models
from spak_jax.config import Config, parse_config
from spak_jax.config_sections import Architecture, Network
from spak_jax.models import flops

# Blocks of a stack of as many weights: each is half as wide, and so has a quarter of them.
NARROW_LAYERS = 4
MOST_LAYERS = 1_000
# Of a looped model's learning rate. Of four recipes tried on parity's stack, one seed each (two
# rates for each of two sizes of first weights), this had most right at the trained length.
DEEP_RATE = 0.25


def peers(config: Config, deep_rate: float = DEEP_RATE) -> list[Config]:
    """A looped model's peers, of the names `NAME-stack`, `NAME-stack-narrow` and `NAME-gru`.

    - A stack of blocks as wide, as many as make a training step cost as many operations
      (`models.flops`), or up to one block more; at another learning rate, which suits it better.
    - A stack of four blocks half as wide, with as many MLP channels as make its weights as many as
      can be.
    - A GRU of the width that makes its weights as many as can be: what reads tokens one by one.

    Args:
      config: of the looped model.
      deep_rate: the learning rate of the first, as a share of the looped model's.
    """
    operations = flops.operations_a_step(config)
    layers = range(1, MOST_LAYERS)
    cost = lambda count: flops.operations_a_step(_stack(config, "stack", "", count))  # noqa: E731
    deep = layers[bisect.bisect_left(layers, operations, key=cost)]
    return [
        _stack(config, "stack", ", as many operations", deep, rate=deep_rate),
        _narrow(config),
        _gru(config),
    ]


def _stack(
    config: Config, name: str, like: str, layers: int, rate: float = 1.0, **own: int
) -> Config:
    shared = config.model.model_dump(include=set(Architecture.model_fields))
    model = shared | {"kind": "gpt", "layers": layers} | own
    return _peer(config, name, "GPT", like, model, rate)


def _narrow(config: Config) -> Config:
    width = config.model.width // 2

    def of_hidden(hidden: int) -> Config:
        own = {"width": width, "hidden": hidden}
        return _stack(config, "stack-narrow", ", as many parameters", NARROW_LAYERS, **own)

    # Kernels take channels by sixteens.
    return _of_as_many_weights(config, of_hidden, range(16, 16 * width, 16))


def _gru(config: Config) -> Config:
    shared = config.model.model_dump(include=set(Network.model_fields))

    def of_width(width: int) -> Config:
        return _peer(config, "gru", "GRU", "", shared | {"kind": "gru", "width": width})

    # One that reads from both ends has half of its width for each.
    step = 1 if config.model.causal else 2
    return _of_as_many_weights(config, of_width, range(step, 8 * config.model.width, step))


def _of_as_many_weights(config: Config, make: Callable[[int], Config], sizes: range) -> Config:
    """What is made of the size whose weights, which grow with it, are nearest in number to those of
    a configuration."""
    wanted = models.parameters_of(config)
    weights = lambda size: models.parameters_of(make(size))  # noqa: E731
    above = bisect.bisect_left(sizes, wanted, key=weights)
    around = sizes[max(0, above - 1) : above + 1]
    return make(min(around, key=lambda size: abs(weights(size) - wanted)))


def _peer(
    config: Config, name: str, kind: str, like: str, model: dict[str, Any], rate: float = 1.0
) -> Config:
    """The same training of another model: "LoopLM (parity)" becomes "GPT (parity, as many ...)".

    rate: times the learning rate.
    """
    system = config.system.replace("LoopLM", kind, 1)
    system = system.removesuffix(")") + like + ")" if like else system
    name = f"{config.name}-{name}"
    values = config.model_dump(mode="json")
    values["train"]["learning_rate"] *= rate
    return parse_config(values | {"name": name, "system": system, "model": model}, name)

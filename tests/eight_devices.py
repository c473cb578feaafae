"""What `test_parallel` looks at: trainings on up to 8 simulated devices, as JSON:
`eight_devices.py FOLDER PART ...`.

A program of its own, as the number of devices is fixed when JAX starts.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import add_layer_norm, add_layer_norm_cross_entropy, attention, shards
from pallas_kernels.ops import linear
from spak_jax import models
from spak_jax.command_line import InputError
from spak_jax.config import Config
from spak_jax.config_sections import Parallel
from spak_jax.data import training_batch
from spak_jax.positions.base import SchemeSettings
from spak_jax.positions.coupled import offset_ids
from spak_jax.positions.rope import RandomRope
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import checkpoint, loggers, parallel
from spak_jax.training.loop import train
from spak_jax.training.step import compiled, init_sharded_state, loss


def config(seeds: int = 1, **devices) -> Config:
    """A step a call, so that the loss of each is logged."""
    recipe = {"steps": 4, "decay_steps": 4, "checkpoint_every": 2, "steps_per_call": 1}
    return tiny_config(
        model={"loops": 2, "positions": "rope"},
        train=recipe | {"seeds": seeds},
        parallel=devices,
    )


def losses(run: Path) -> list[float]:
    return [line.loss for line in loggers.read(run)]


def gone_on_with(folder: Path) -> dict:
    """One device; and 8 devices, then 2 that share the weights."""
    train(config(), folder / "one")
    train(config(data=8), folder / "several", 2)
    train(config(data=2, shard_weights=True), folder / "several")
    one, several = (checkpoint.restore(folder / name).weights for name in ("one", "several"))
    return {
        "one": losses(folder / "one"),
        "several": losses(folder / "several"),
        "largest_difference": max(float(abs(one[name] - several[name]).max()) for name in one),
    }


def seeds_on_devices(folder: Path) -> dict:
    spread = config(seeds=2)
    spread = spread.model_copy(update={"parallel": Parallel(seeds=2)})
    states = train(spread, folder / "seeds")
    run_steps, _ = compiled(spread)
    return {
        "seeds": [losses(folder / "seeds" / name) for name in ("seed0", "seed1")],
        "devices_of_a_result": len(jax.tree.leaves(states[0].weights)[0].devices()),
        "program": run_steps.as_text(),
    }


def shares_of_weights() -> dict:
    """How much of each matrix one of 2 devices keeps."""
    state = init_sharded_state(config(data=2, shard_weights=True))
    matrices = [x for x in jax.tree.leaves((state.weights, state.optimizer)) if x.ndim == 2]
    return {"shares": [x.addressable_shards[0].data.size / x.size for x in matrices]}


def on_4_devices(function, out_specs, rows, whole):
    """`function(rows, whole)` of arrays that are split over 4 devices, and of others."""
    return jax.jit(
        jax.shard_map(
            function,
            mesh=jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4]),
            in_specs=(PartitionSpec("data"), PartitionSpec()),
            out_specs=out_specs,
            check_vma=False,
        )
    )(rows, whole)


def random_places() -> dict:
    """Whether what each row draws is the same on 4 devices as on 1."""
    tokens = jnp.arange(8 * 6).reshape(8, 6) % 13
    scheme = RandomRope(SchemeSettings(vocabulary=13, width=16), rngs=nnx.Rngs(0))
    draws = {
        "gaps": lambda tokens, key: (
            scheme.inputs(tokens, positions=jnp.arange(6), key=key).rope_positions
        ),
        "offsets": offset_ids,
    }
    key = jax.random.key(0)
    return {
        name: bool(
            (on_4_devices(draw, PartitionSpec("data"), tokens, key) == draw(tokens, key)).all()
        )
        for name, draw in draws.items()
    }


def kernels() -> dict:
    """Relative differences of a sum and its gradients by kernels on 4 devices and on 1."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    batch, length, heads, width = 8, 6, 2, 32
    rows = (
        normal(0, batch, length, width),
        normal(1, batch, length, width),
        normal(2, batch, length, 3, heads, width // heads),
    )
    whole = normal(3, width), normal(4, 13, width)

    def summed(rows, whole):
        (x, update, qkv), (scale, table) = rows, whole
        options = dict(dropout_rate=0.5, dropout_key=jax.random.key(5), implementation="pallas")
        wanted, weights = jnp.ones(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2])
        stream, normed = add_layer_norm(x, update, scale, **options)
        stream, score = add_layer_norm_cross_entropy(
            stream, normed, scale, table, wanted, weights, **options
        )
        return (stream**2).sum() + score + (attention(qkv, **options) ** 3).sum()

    differentiated = jax.value_and_grad(summed, argnums=(0, 1))

    def of_rows(rows, whole):
        value, (of_rows, of_whole) = differentiated(rows, whole)
        return shards.total(value), (of_rows, shards.total(of_whole))

    specs = PartitionSpec(), (PartitionSpec("data"), PartitionSpec())
    found = on_4_devices(of_rows, specs, rows, whole), jax.jit(differentiated)(rows, whole)
    pairs = zip(*map(jax.tree.leaves, found), strict=True)
    return {"differences": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]}


def gradients_at_once() -> dict:
    """Relative differences of a step's loss and gradients on 2 devices and on 1, where products are
    kernels and all blocks' gradients are made in one launch."""
    small = tiny_config(
        model={"width": 64, "hidden": 64, "loops": 2, "positions": "rope"},
        data={"row_length": 64},
        train={"batch": 4},
    )
    network = models.build(small, jax.random.key(0))
    definition, weights = nnx.split(network)
    batch = training_batch(jax.random.key(1), small.data, small.train.batch, None)

    def objective(weights, batch, key):
        return loss(nnx.merge(definition, weights), batch, Addition(), key)

    def on(devices):
        step = parallel.value_and_grad(objective, devices)
        return jax.tree.leaves(jax.jit(step)(weights, batch, jax.random.key(2)))

    with mock.patch.object(linear, "supports", lambda tokens, *sizes: tokens % 128 == 0):
        pairs = zip(on(Parallel(data=2)), on(Parallel()), strict=True)
        return {"differences": [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]}


def too_many_devices() -> dict:
    try:
        init_sharded_state(tiny_config(train={"batch": 16}, parallel={"data": 16}))
    except InputError as error:
        return {"refused": str(error)}
    return {}


PARTS = {
    "gone_on_with": gone_on_with,
    "seeds": seeds_on_devices,
    "shares": lambda folder: shares_of_weights(),
    "random_places": lambda folder: random_places(),
    "kernels": lambda folder: kernels(),
    "gradients_at_once": lambda folder: gradients_at_once(),
    "too_many": lambda folder: too_many_devices(),
}


def main() -> None:
    folder, *names = sys.argv[1:]
    found = {name: PARTS[name](Path(folder)) for name in names}
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

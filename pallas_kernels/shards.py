"""Batches whose rows are split over devices: which of all rows a device holds.

Within `jax.shard_map` over a mesh axis named `data`, whatever goes by the number of a row (dropout,
random places) counts the rows of all devices, so that nothing depends on how many there are. The
first axis is split evenly. Outside of it a batch is whole, and nothing here does anything.
"""

from collections.abc import Callable

import jax

AXIS = "data"


def is_split() -> bool:
    """Whether what is traced holds a part of the rows."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def require_counted(argument: str) -> None:
    """Raises `ValueError`, which names the argument, where every shard would draw the same: within
    `jax.shard_map` over axes of which none is `data`."""
    mesh = jax.sharding.get_abstract_mesh()
    split = mesh.manual_axes
    axes = [axis for axis in mesh.axis_names if axis in split and mesh.shape[axis] > 1]
    if axes and not is_split():
        raise ValueError(
            f"{argument}: within jax.shard_map over the axes {', '.join(map(repr, axes))} every"
            f" shard would drop the same; name the axis that rows are split over {AXIS!r}"
        )


def first_row(rows: int) -> jax.Array | int:
    """The number of this device's first row among all, where each device holds `rows`."""
    return jax.lax.axis_index(AXIS) * rows if is_split() else 0


def drawn(draw: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """This device's rows of `draw(x)`, which is shown the rows of all devices and draws for all."""
    if not is_split():
        return draw(x)
    every = draw(jax.lax.all_gather(x, AXIS, tiled=True))
    return jax.lax.dynamic_slice_in_dim(every, first_row(len(x)), len(x))


def total(x):
    """The sum over all devices of each array of a pytree."""
    return jax.lax.psum(x, AXIS) if is_split() else x

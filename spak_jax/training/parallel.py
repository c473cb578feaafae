"""Training on several devices: a mesh, what lies where on it, and processes that act as one.

The mesh has two axes. Over `data` the rows of a batch are split: within `jax.shard_map` each device
computes the loss and the gradient of its rows, kernels included, and one sum over the devices makes
them those of the batch. Over `seeds` trainings are split, which have nothing to exchange. All else
(drawing batches, the optimizer) is written for whole arrays, and XLA leaves each part where it is.

On one device there is no mesh, and programs are what they would be without this module.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import shards
from spak_jax.command_line import Failure, InputError, console, first_line
from spak_jax.config_sections import Parallel
from spak_jax.training import signals

SEEDS = "seeds"
SHUTDOWN_SECONDS = 24 * 60 * 60
# How JAX's errors begin where another process does not answer.
OF_OTHERS = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


def mesh_of(parallel: Parallel) -> Mesh | None:
    """The mesh of a configuration; None for one device.

    Raises:
      InputError: there are not as many devices.
    """
    wanted, found = parallel.seeds * parallel.data, jax.device_count()
    processes = jax.process_count()
    if wanted > found or (processes > 1 and wanted < found):
        least = "exactly" if processes > 1 else "at least"
        raise InputError(
            f"parallel.data = {parallel.data} and parallel.seeds = {parallel.seeds} need {least}"
            f" {wanted} devices: there are {found}"
            + (f", of {processes} processes" if processes > 1 else "")
        )
    if wanted == 1:
        return None
    return jax.make_mesh(
        (parallel.seeds, parallel.data),
        (SEEDS, shards.AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:wanted],
    )


def shardings(tree: Any, parallel: Parallel, over_seeds: bool) -> Any:
    """Where the arrays of a training's state lie, as a pytree; None where there is one device.

    Args:
      tree: the arrays, or their shapes.
      parallel: the devices.
      over_seeds: whether the first axis of each is for the seeds.
    """
    mesh = mesh_of(parallel)
    if mesh is None:
        return None

    def one(x):
        if not over_seeds:
            return NamedSharding(mesh, _share(x.shape, parallel))
        return NamedSharding(mesh, PartitionSpec(SEEDS, *_share(x.shape[1:], parallel)))

    return jax.tree.map(one, tree)


def replicated(parallel: Parallel) -> NamedSharding | None:
    """The sharding of arrays that every device has whole; None where there is one device."""
    mesh = mesh_of(parallel)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def over_seeds(function: Callable, parallel: Parallel, **axes: Any) -> Callable:
    """`jax.vmap(function, **axes)`, each group of devices taking its part of the seeds."""
    spread = {} if mesh_of(parallel) is None else {"spmd_axis_name": SEEDS}
    return jax.vmap(function, **axes, **spread)


def value(objective: Callable, parallel: Parallel) -> Callable:
    """`objective` over the rows of all devices; arguments as of `value_and_grad`."""
    mesh = mesh_of(parallel)
    if mesh is None:
        return objective

    def of_all(weights, batch, *rest):
        specs = _shares(weights, parallel)

        def of_rows(weights, *given):
            return shards.total(objective(_whole(weights, specs), *given))

        return _over_rows(of_rows, mesh, specs, PartitionSpec(), weights, batch, *rest)

    return of_all


def value_and_grad(objective: Callable, parallel: Parallel) -> Callable:
    """`jax.value_and_grad(objective)` over the rows of all devices.

    Args:
      objective: a scalar function of (weights, batch, ...): a sum over the batch's first axis,
        whatever normalises it being a `shards.total`. Each device calls it with its own rows.
      parallel: the devices.

    Returns:
      A function of the same arguments: the sum over all rows, and its gradient, which lies where
      the weights do.
    """
    mesh = mesh_of(parallel)
    if mesh is None:
        return jax.value_and_grad(objective)

    def of_all(weights, batch, *rest):
        specs = _shares(weights, parallel)

        def of_rows(weights, *given):
            def of_shares(weights):
                return objective(_whole(weights, specs), *given)

            part, gradients = jax.value_and_grad(of_shares)(weights)
            # Where a weight was brought together, the way back has summed its gradient already.
            gradients = jax.tree.map(
                lambda x, spec: x if shards.AXIS in spec else shards.total(x), gradients, specs
            )
            return shards.total(part), gradients

        return _over_rows(of_rows, mesh, specs, (PartitionSpec(), specs), weights, batch, *rest)

    return of_all


@contextlib.contextmanager
def distributed_session() -> Iterator[None]:
    """Makes this process one of several, as Slurm, Open MPI or the environment says.

    Of the environment JAX reads `JAX_COORDINATOR_ADDRESS` (host:port of the first process), and we
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0). Only the first process prints and writes.

    Raises:
      InputError: nothing says so, or a variable is no number.
      Failure: the others do not answer.
    """
    given = {}
    for argument, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if variable in os.environ:
            if not os.environ[variable].isdecimal():
                raise InputError(f"{variable} = {os.environ[variable]!r}: must be a number")
            given[argument] = int(os.environ[variable])
    try:
        # The first process scores after the others have ended: they wait for it.
        jax.distributed.initialize(**given, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except ValueError as error:
        raise InputError(
            f"--distributed: {error} Start it by Slurm or Open MPI, or set JAX_COORDINATOR_ADDRESS,"
            " JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    except RuntimeError as error:
        raise Failure(f"the processes did not find each other: {first_line(error)}") from None
    console.quiet = not is_primary_process()
    try:
        yield
    except signals.Stopped:
        raise
    except BaseException as error:
        # A process that ends waits for the others to end, and these may wait for it.
        if isinstance(error, Failure):
            print(f"{error.label}: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(error.status if isinstance(error, Failure) else 1)


def is_primary_process() -> bool:
    """Whether this process writes: the first, or the only one."""
    return jax.process_index() == 0


def all_gather(*numbers: int) -> list[list[int]]:
    """Of each number, those of all processes: what they agree by."""
    if jax.process_count() == 1:
        return [[number] for number in numbers]
    return multihost_utils.process_allgather(np.array(numbers)).T.tolist()


def on_primary_process(action: Callable[[], None]) -> None:
    """Runs `action` in the first process; what it raises ends the others too.

    Raises:
      Failure: that of `action`; in the other processes, one that points to it.
    """
    failure = None
    if is_primary_process():
        try:
            action()
        except Failure as raised:
            failure = raised
    (went_well,) = all_gather(failure is None)
    if failure is not None:
        raise failure
    if not all(went_well):
        raise Failure("the first process could not go on; it says why")


def is_of_another_process(error: Exception) -> bool:
    """Whether it says that what processes do together failed; JAX has no type of its own for it."""
    return jax.process_count() > 1 and str(error).startswith(OF_OTHERS)


def on_host(tree: Any) -> Any:
    """Whole arrays in NumPy, in every process."""

    def whole(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def on_first_device(tree: Any, parallel: Parallel) -> Any:
    """Whole arrays on the one device that computes where there is no mesh."""
    return tree if mesh_of(parallel) is None else jax.device_put(on_host(tree))


def devices_in_words(parallel: Parallel) -> str:
    """What a training computes on."""
    kind, count = jax.devices()[0].device_kind, parallel.seeds * parallel.data
    return kind if count == 1 else f"{count} x {kind}"


def _over_rows(function, mesh, weights_spec, out_specs, weights, batch, *rest):
    """`function` of each device's shares of the weights and rows of the batch, and of all else."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(weights_spec, PartitionSpec(shards.AXIS), *(PartitionSpec() for _ in rest)),
        out_specs=out_specs,
        # Kernels do not say what varies over devices.
        check_vma=False,
    )(weights, batch, *rest)


def _whole(shares: Any, specs: Any) -> Any:
    """Weights brought together from all devices."""

    def one(x, spec):
        if shards.AXIS not in spec:
            return x
        return jax.lax.all_gather(x, shards.AXIS, axis=spec.index(shards.AXIS), tiled=True)

    return jax.tree.map(one, shares, specs)


def _shares(tree: Any, parallel: Parallel) -> Any:
    return jax.tree.map(lambda x: _share(x.shape, parallel), tree)


def _share(shape: tuple[int, ...], parallel: Parallel) -> PartitionSpec:
    """How one array of a state is split over the `data` devices: matrices along their longest axis
    that can be, if at all."""
    axes = [None] * len(shape)
    if parallel.shard_weights and len(shape) > 1:
        fitting = [axis for axis, size in enumerate(shape) if size % parallel.data == 0]
        if fitting:
            axes[max(fitting, key=lambda axis: shape[axis])] = shards.AXIS
    return PartitionSpec(*axes)

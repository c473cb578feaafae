"""Run folders: what a training leaves behind, and how it is read back without a doubt.

    RUN/checkpoints/STEP/weights      arrays by name, such as `block.qkv.kernel`
    RUN/checkpoints/STEP/optimizer    its arrays, likewise; absent from imported weights
    RUN/checkpoints/STEP/description  JSON: the whole configuration, and a digest of the arrays
    RUN/metrics.jsonl                 one line for each compiled call of the training
    RUN/results.json                  the scores that ended the training

Orbax writes a checkpoint aside and renames it when it is whole, so a killed save leaves none. The
digest says on reading that the arrays are those that were written.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from spak_jax.command_line import InputError, writable_folder
from spak_jax.config import Config, parse_config

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
RESULTS = "results.json"

KEPT = 2

# Orbax tells every save and restore; our programs say what matters themselves.
logging.getLogger("absl").setLevel(logging.ERROR)


class Restored(NamedTuple):
    """One checkpoint: its step, configuration, weights and optimizer arrays by name."""

    step: int
    config: Config
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] | None


class Run:
    """The checkpoints of a run folder that a training writes to.

    Args:
      path: the run folder; made if absent.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        folder = writable_folder(path / CHECKPOINTS)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, config: Config, weights: Any, optimizer: Any = None) -> None:
        """Writes a checkpoint of two pytrees of arrays; older ones than the last two go."""
        # On the host: NumPy arrays carry no trace of the device that a reader would need.
        arrays = {"weights": named_arrays(jax.device_get(weights))}
        if optimizer is not None:
            arrays["optimizer"] = named_arrays(jax.device_get(optimizer))
        description = {
            "config": config.model_dump(mode="json"),
            "digests": {item: digest(named) for item, named in arrays.items()},
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                description=ocp.args.JsonSave(description),
                **{item: ocp.args.StandardSave(named) for item, named in arrays.items()},
            ),
            force=True,
        )

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of later steps than this."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        self._manager.close()


def steps_in(run: Path) -> list[int]:
    """The steps that a run folder holds whole checkpoints of, in order."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


def restore(run: Path, *, optimizer: bool = False, at_most: int | None = None) -> Restored:
    """The newest checkpoint of a run folder, verified.

    Args:
      run: the run folder.
      optimizer: whether the optimizer's arrays are wanted too.
      at_most: the latest step to take; None for any.

    Raises:
      InputError: there is none, or it is damaged; the message names it and the one before it.
    """
    if not run.is_dir():
        raise InputError(f"there is no run folder {run}")
    steps = [step for step in steps_in(run) if at_most is None or step <= at_most]
    if not steps:
        raise InputError(f"the run folder {run} holds no checkpoint")
    folder = run / CHECKPOINTS / str(steps[-1])
    try:
        return _read(folder, steps[-1], optimizer)
    except Exception as error:  # noqa: BLE001  damage surfaces as any error of any layer
        reason = str(error).strip().splitlines()
        way_out = (
            f"remove that folder to go back to step {steps[-2]}"
            if len(steps) > 1
            else "no earlier one is left: train again with --fresh"
        )
        raise InputError(
            f"the checkpoint {folder} is damaged"
            f" ({reason[0][:200] if reason else type(error).__name__}); {way_out}"
        ) from None


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Some versions of Flax show a variable's value as a level of its own.
    name = lambda path: (  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    )
    return {name(path): leaf for path, leaf in leaves}


def from_named(like: Any, arrays: Mapping[str, Any]) -> Any:
    """The pytree shaped as `like` whose leaves stand in `arrays` under their dotted paths.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype.
    """
    wanted = named_arrays(like)
    if wanted.keys() != arrays.keys():
        odd = sorted(wanted.keys() ^ arrays.keys())
        raise ValueError(f"the arrays {', '.join(odd[:4])} are missing or unknown")
    for name, leaf in wanted.items():
        found = arrays[name]
        if (leaf.shape, leaf.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"{name} is {found.dtype}{list(found.shape)}, expected"
                f" {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def _read(folder: Path, step: int, optimizer: bool) -> Restored:
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    folder = folder.absolute()
    with checkpointer:
        description = checkpointer.restore(
            folder, args=ocp.args.Composite(description=ocp.args.JsonRestore())
        )["description"]
        config = parse_config(description["config"], "its configuration")
        wanted = [item for item in description["digests"] if optimizer or item == "weights"]
        arrays = checkpointer.restore(
            folder,
            args=ocp.args.Composite(**{item: ocp.args.StandardRestore() for item in wanted}),
        )
    for item in wanted:
        if digest(arrays[item]) != description["digests"][item]:
            raise ValueError(f"its {item} are not those that were saved")
    return Restored(
        step, config, arrays["weights"], arrays["optimizer"] if "optimizer" in wanted else None
    )

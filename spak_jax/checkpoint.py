"""Run folders: what a training leaves behind, and how it is read back without a doubt.

    RUN/checkpoints/STEP/weights      arrays by name, such as `block.qkv.kernel`
    RUN/checkpoints/STEP/optimizer    its arrays, likewise; absent from imported weights
    RUN/checkpoints/STEP/description  JSON: the whole configuration, and digests of all of it
    RUN/metrics.jsonl                 one line for each compiled call of the training (`metrics`)
    RUN/results.json                  the scores that ended the training
    RUN/lock                          held by the process that writes to the folder

Orbax writes a checkpoint aside and renames it when it is whole, so a killed save leaves none. The
digests say on reading that arrays and configuration are those that were written. A checkpoint does
not depend on the devices that it was made on: arrays are saved whole.

Of several processes all must call what is here together, and see the same folder; the first writes.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from spak_jax import parallel
from spak_jax.command_line import Failure, InputError, first_line, writable_folder
from spak_jax.config import Config, parse_config

CHECKPOINTS = "checkpoints"
RESULTS = "results.json"
LOCK = "lock"
# What a description holds; those from before the configuration had a digest lack the last.
DESCRIBED = ("config", "digests", "digest")

KEPT = 2

# Orbax tells every save, restore and error; our programs say what matters themselves.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# Of several arrays that cannot be read, one error is raised; asyncio would tell the rest.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _but_late_answers(tell: Callable[[Any], None]) -> Callable[[Any], None]:
    """A hook for errors that nobody can catch, without those of arrays that nobody waits for.

    After one array could not be read, TensorStore goes on and answers to an event loop of Orbax
    that is closed, and Python would print a traceback for each.
    """

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    return hook


sys.unraisablehook = _but_late_answers(sys.unraisablehook)


class Restored(NamedTuple):
    """One checkpoint: its step, configuration, weights and optimizer arrays by name."""

    step: int
    config: Config
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] | None


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within it no other process writes to a run folder, which is made if absent.

    The lock is the operating system's: it ends with the process that holds it, whatever ends that.

    Raises:
      InputError: another process holds it, or the folder cannot be written.
    """
    writable_folder(run)
    try:
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise InputError(f"cannot write {run / LOCK}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run} is being written by another process ({file.read(100).strip()}); wait for"
                " it, or name another folder"
            ) from None
        except OSError as error:
            raise InputError(f"cannot lock {run / LOCK}: {error.strerror}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            # Who held it is nobody's business in a folder that is given away.
            with contextlib.suppress(OSError):
                file.truncate(0)


class Run:
    """The checkpoints of a run folder that a training writes to, holding its lock (`locked`).

    Args:
      path: the run folder; made if absent.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        folder = path / CHECKPOINTS
        parallel.by_first(lambda: writable_folder(folder))
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, config: Config, weights: Any, optimizer: Any = None) -> None:
        """Writes a checkpoint of two pytrees of arrays; older ones than the last two go.

        Raises:
          Failure: the disk is full, or the folder gone or no longer writable; older checkpoints
            are as they were.
        """
        # On the host: NumPy arrays carry no trace of the device that a reader would need.
        arrays = {"weights": named_arrays(jax.device_get(weights))}
        if optimizer is not None:
            arrays["optimizer"] = named_arrays(jax.device_get(optimizer))
        description = {
            "config": config.model_dump(mode="json"),
            "digests": {item: digest(named) for item, named in arrays.items()},
        }
        description["digest"] = _digest_of_text(description)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    description=ocp.args.JsonSave(description),
                    **{item: ocp.args.StandardSave(named) for item, named in arrays.items()},
                ),
                force=True,
            )
        except Exception as error:  # noqa: BLE001  a full disk surfaces as any error of any layer
            if parallel.is_of_another_process(error):
                raise
            older = [f"that of step {kept} is kept; " for kept in steps_in(self.path)[-1:]]
            raise Failure(
                f"cannot save the checkpoint of step {step} in {self.path} ({first_line(error)});"
                f" {''.join(older)}make room, or the folder writable, and give the same command"
                " again"
            ) from None

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
    folders = [run / CHECKPOINTS / str(step) for step in steps]
    try:
        return _read(folders[-1], steps[-1], optimizer)
    except Exception as error:  # noqa: BLE001  damage surfaces as any error of any layer
        good = _newest_good(folders[:-1], steps)
        way_out = (
            "no earlier one is good: train again with --fresh"
            if good is None
            else f"remove {_listed(folders[steps.index(good) + 1 :])} to go back to step {good},"
            " which is good"
        )
        raise InputError(
            f"the checkpoint {folders[-1]} is damaged ({first_line(error)}); {way_out}"
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


def _newest_good(folders: list[Path], steps: list[int]) -> int | None:
    """The last of these steps whose checkpoint can be read whole; None for none."""
    for folder, step in reversed(list(zip(folders, steps, strict=False))):
        # Whatever is wrong with it, it is not good.
        with contextlib.suppress(Exception):
            return _read(folder, step, optimizer=True).step
    return None


def _listed(folders: list[Path]) -> str:
    return " and ".join(map(str, folders))


def _digest_of_text(description: Mapping[str, Any]) -> str:
    """SHA-256 of a description's configuration and of the digests in it."""
    described = {key: description[key] for key in DESCRIBED[:2]}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, step: int, optimizer: bool) -> Restored:
    _refuse_links(folder)
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    folder = folder.absolute()
    with checkpointer:
        description = checkpointer.restore(
            folder, args=ocp.args.Composite(description=ocp.args.JsonRestore())
        )["description"]
        unknown = description.keys() - set(DESCRIBED)
        if unknown:
            raise ValueError(f"its description holds {', '.join(sorted(unknown))[:100]}")
        if "digest" in description and description["digest"] != _digest_of_text(description):
            raise ValueError("its configuration is not that which was saved")
        config = parse_config(description["config"], "its configuration")
        wanted = [item for item in description["digests"] if optimizer or item == "weights"]
        # Not StandardRestore, which asks TensorStore to describe each array in JSON once more: that
        # loses two kilobytes a time (0.1.86).
        arrays = checkpointer.restore(
            folder,
            args=ocp.args.Composite(**{item: ocp.args.PyTreeRestore() for item in wanted}),
        )
    for item in wanted:
        if digest(arrays[item]) != description["digests"][item]:
            raise ValueError(f"its {item} are not those that were saved")
    return Restored(
        step, config, arrays["weights"], arrays["optimizer"] if "optimizer" in wanted else None
    )


def _refuse_links(folder: Path) -> None:
    """Raises ValueError where something in a checkpoint leads out of it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                raise ValueError(f"{name} is a link, which is not followed")

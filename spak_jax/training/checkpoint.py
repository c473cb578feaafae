"""Checkpoints: saved whole or not at all, and read back without a doubt.

A checkpoint is written aside, read back, and renamed when all of it came back, so a killed save
leaves none. (Of large ones each array is looked up, and not read: that would take as long as the
save.) The digests say on reading that arrays and configuration are those that were written; where
reading fails, those of the files say whether the checkpoint is damaged or something else is wrong.
A checkpoint does not depend on the devices that it was made on: arrays are saved whole.

Of several processes all must call what is here together, and see the same folder; the first writes.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spak_jax.command_line import Failure, InputError, require_devices, writable_folder
from spak_jax.config import Config
from spak_jax.training import parallel
from spak_jax.training.damage import cause, refusal
from spak_jax.training.named_arrays import digest, named_arrays
from spak_jax.training.run_folder import CHECKPOINTS, steps_in
from spak_jax.training.stored_checkpoint import (
    FILES,
    Restored,
    digest_of_text,
    digests_of_files,
    plainly_named,
    read,
    require_saved,
)

KEPT = 2
# What is being written, and what is being removed: no reader takes it for a checkpoint.
UNSEEN, REMOVED = ".unseen", ".removed"
# What a killed process may have left of both; ours, so that it may go.
LEFT_OVER = re.compile(r"[0-9]+(\.unseen|\.removed)?(\.orbax-checkpoint-tmp.*)?")


class Run:
    """The checkpoints of a run folder that a training writes to, holding its lock (`locked`).

    Args:
      path: the run folder; made if absent.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._folder = path / CHECKPOINTS
        parallel.on_primary_process(self._begin)
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, config: Config, weights: Any, optimizer: Any = None) -> None:
        """Writes a checkpoint of two pytrees of arrays; older ones than the last two go.

        It counts once all of it has been read back.

        Raises:
          InputError: no path to the folder serves (`plainly_named`).
          Failure: the disk is full, the folder gone or no longer writable, or something else came
            back than was written; older checkpoints are as they were.
        """
        # On the host: NumPy arrays carry no trace of the device that a reader would need.
        arrays = {"weights": named_arrays(jax.device_get(weights))}
        if optimizer is not None:
            arrays["optimizer"] = named_arrays(jax.device_get(optimizer))
        description = {
            "config": config.model_dump(mode="json"),
            "digests": {item: digest(named) for item, named in arrays.items()},
        }
        description["digest"] = digest_of_text(description)
        unseen = self._folder / f"{step}{UNSEEN}"
        try:
            with plainly_named(self._folder) as folder:
                self._checkpointer.save(
                    folder / unseen.name,
                    args=ocp.args.Composite(
                        description=ocp.args.JsonSave(description),
                        **{item: ocp.args.StandardSave(named) for item, named in arrays.items()},
                    ),
                    force=True,
                )
            require_saved(unseen, description, arrays)
            parallel.on_primary_process(lambda: self._keep(unseen, step))
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  a full disk surfaces as any error of any layer
            if parallel.is_of_another_process(error):
                raise
            older = [f"that of step {kept} is kept; " for kept in steps_in(self.path)[-1:]]
            raise Failure(
                f"cannot save the checkpoint of step {step} in {self.path} ({cause(error)});"
                f" {''.join(older)}make room, or the folder writable, and give the same command"
                " again"
            ) from None

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of later steps than this."""
        later = [each for each in steps_in(self.path) if each > step]
        parallel.on_primary_process(lambda: [_remove(self._folder / str(each)) for each in later])

    def close(self) -> None:
        self._checkpointer.close()

    def _begin(self) -> None:
        writable_folder(self._folder)
        for entry in self._folder.iterdir():
            if LEFT_OVER.fullmatch(entry.name) and not entry.name.isdecimal():
                shutil.rmtree(entry, ignore_errors=True)

    def _keep(self, unseen: Path, step: int) -> None:
        """Gives a checkpoint that has been read back its name, and removes older ones."""
        # Orbax notes in them where on this machine it wrote; only remote stores are read by them.
        for note in unseen.rglob("commit_success.txt"):
            note.unlink()
        (unseen / FILES).write_text(json.dumps(digests_of_files(unseen), indent=1) + "\n")
        kept = self._folder / str(step)
        if kept.exists():
            _remove(kept)
        unseen.rename(kept)
        for older in steps_in(self.path)[:-KEPT]:
            _remove(self._folder / str(older))


def restore(run: Path, *, optimizer: bool = False, at_most: int | None = None) -> Restored:
    """The newest checkpoint of a run folder, verified.

    A training may go on in it meanwhile: where a checkpoint was removed for a newer one while it
    was read, that one is read.

    Args:
      run: the run folder.
      optimizer: whether the optimizer's arrays are wanted too.
      at_most: the latest step to take; None for any.

    Raises:
      InputError: there is none, it is damaged, or it cannot be read; the message names it, and the
        cause. Where it is damaged, also the good one before it.
    """
    require_devices()
    while True:
        steps = [step for step in steps_in(run) if at_most is None or step <= at_most]
        if not steps:
            what = f"the run folder {run} holds no checkpoint"
            raise InputError(what if run.is_dir() else f"there is no run folder {run}")
        folders = [run / CHECKPOINTS / str(step) for step in steps]
        try:
            return read(folders[-1], steps[-1], optimizer)
        except Exception as error:  # noqa: BLE001  damage surfaces as any error of any layer
            # Else it was removed meanwhile.
            if steps[-1] in steps_in(run):
                raise refusal(folders, steps, error) from None


def _remove(folder: Path) -> None:
    """Removes a checkpoint; who reads it meanwhile finds all of it or no name."""
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    # What cannot be removed now is no checkpoint any more; the next training tries again.
    shutil.rmtree(removed, ignore_errors=True)

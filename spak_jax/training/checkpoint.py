"""Run folders: what a training leaves behind, and how it is read back without a doubt.

    RUN/checkpoints/STEP/weights      arrays by name, such as `block.qkv.kernel`
    RUN/checkpoints/STEP/optimizer    its arrays, likewise; absent from imported weights
    RUN/checkpoints/STEP/description  JSON: the whole configuration, and digests of all of it
    RUN/checkpoints/STEP/files.json   the digest of each of these files
    RUN/metrics.jsonl                 one line for each compiled call of the training (`metrics`)
    RUN/results.json                  the scores that ended the training
    RUN/lock                          held by the process that writes to the folder

A checkpoint is written aside, read back, and renamed when all of it came back, so a killed save
leaves none. (Of large ones each array is looked up, and not read: that would take as long as the
save.) The digests say on reading that arrays and configuration are those that were written; where
reading fails, those of the files say whether the checkpoint is damaged or something else is wrong.
A checkpoint does not depend on the devices that it was made on: arrays are saved whole.

Of several processes all must call what is here together, and see the same folder; the first writes.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from spak_jax.command_line import (
    Failure,
    InputError,
    first_line,
    require_devices,
    writable_folder,
)
from spak_jax.config import Config, parse_config
from spak_jax.training import parallel

CHECKPOINTS = "checkpoints"
RESULTS = "results.json"
LOCK = "lock"
FILES = "files.json"
# What a description holds; those from before the configuration had a digest lack the last.
DESCRIBED = ("config", "digests", "digest")

# Weights that have kept the name by which files of all times store them.
STORED_NAMES = {
    "position_scheme.counter.gate_logits": "pointer.gate_logits",
    "position_scheme.id_embedding.embedding": "id_embedding.embedding",
}

KEPT = 2
# Bytes of weights, or of the optimizer's arrays, that a save reads back.
READ_BACK = 2**26
# What is being written, and what is being removed: no reader takes it for a checkpoint.
UNSEEN, REMOVED = ".unseen", ".removed"
# What a killed process may have left of both; ours, so that it may go.
LEFT_OVER = re.compile(r"[0-9]+(\.unseen|\.removed)?(\.orbax-checkpoint-tmp.*)?")

# A path that libraries take for nothing but a path. Others hold patterns (`[`, `*`), escapes, the
# beginning of an address (`gs:/`), or are no text.
PLAIN_PATH = re.compile(r"[A-Za-z0-9._/-]{1,1000}")
# How the errors of Orbax begin that a damaged checkpoint without digests of its files gives; their
# text tells full memory and missing permission apart.
OF_DAMAGE = (ValueError, LookupError, FileNotFoundError, EOFError)
OF_SURROUNDINGS = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|UNIMPLEMENTED|CANCELLED|ABORTED"
    "|DEADLINE_EXCEEDED|INTERNAL"
)


class Restored(NamedTuple):
    """One checkpoint: its step, configuration, weights and optimizer arrays by name."""

    step: int
    config: Config
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] | None


class Damaged(ValueError):
    """What stands in a checkpoint is not what was saved, or nothing that we save."""


def run_folder(text: str) -> Path:
    """A run folder as the command line names it.

    Raises:
      InputError: it names none: no text, as of an unset variable, or a file.
    """
    if not text:
        raise InputError("the name of the run folder is empty: name a folder, or . for this one")
    path = Path(text)
    try:
        path.stat()
        is_file = not path.is_dir()
    except FileNotFoundError:
        is_file = False
    except NotADirectoryError:
        is_file = True
    except OSError as error:
        raise InputError(f"cannot use the run folder {path}: {error.strerror}") from None
    if is_file:
        raise InputError(f"the run folder {path} cannot be a folder: it is a file, or under one")
    return path


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within it no other process writes to a run folder, which is made if absent.

    The lock is the operating system's: it ends with the process that holds it, whatever ends that.

    Raises:
      InputError: another process holds it, the folder cannot be written, or the system has no such
        locks.
    """
    try:
        import fcntl
    except ImportError:
        raise InputError(
            f"writing run folders needs Linux or macOS: {platform.system()} has no locks of theirs"
            " (on Windows, work inside WSL)"
        ) from None
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
        self._folder = path / CHECKPOINTS
        parallel.on_primary_process(self._begin)
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, config: Config, weights: Any, optimizer: Any = None) -> None:
        """Writes a checkpoint of two pytrees of arrays; older ones than the last two go.

        It counts once all of it has been read back.

        Raises:
          InputError: no path to the folder serves (`_plainly_named`).
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
        description["digest"] = _digest_of_text(description)
        unseen = self._folder / f"{step}{UNSEEN}"
        try:
            with _plainly_named(self._folder) as folder:
                self._checkpointer.save(
                    folder / unseen.name,
                    args=ocp.args.Composite(
                        description=ocp.args.JsonSave(description),
                        **{item: ocp.args.StandardSave(named) for item, named in arrays.items()},
                    ),
                    force=True,
                )
            _require_saved(unseen, description, arrays)
            parallel.on_primary_process(lambda: self._keep(unseen, step))
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  a full disk surfaces as any error of any layer
            if parallel.is_of_another_process(error):
                raise
            older = [f"that of step {kept} is kept; " for kept in steps_in(self.path)[-1:]]
            raise Failure(
                f"cannot save the checkpoint of step {step} in {self.path} ({_cause(error)});"
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
        (unseen / FILES).write_text(json.dumps(_digests_of_files(unseen), indent=1) + "\n")
        kept = self._folder / str(step)
        if kept.exists():
            _remove(kept)
        unseen.rename(kept)
        for older in steps_in(self.path)[:-KEPT]:
            _remove(self._folder / str(older))


def steps_in(run: Path) -> list[int]:
    """The steps that a run folder holds whole checkpoints of, in order.

    Entries of other names than we give are none of ours.

    Raises:
      InputError: the folder cannot be read.
    """
    try:
        names = [entry.name for entry in os.scandir(run / CHECKPOINTS) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {run / CHECKPOINTS}: {error.strerror}") from None
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,18}", name))


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
            return _read(folders[-1], steps[-1], optimizer)
        except Exception as error:  # noqa: BLE001  damage surfaces as any error of any layer
            # Else it was removed meanwhile.
            if steps[-1] in steps_in(run):
                raise _refusal(folders, steps, error) from None


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted paths, as they are stored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_stored_name(path): leaf for path, leaf in leaves}


def _stored_name(path: tuple) -> str:
    # Some versions of Flax show a variable's value as a level of its own.
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    for ours, stored in STORED_NAMES.items():
        # An optimizer's arrays have the names of weights behind their own.
        if name == ours or name.endswith(f".{ours}"):
            return name.removesuffix(ours) + stored
    return name


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
        # As bytes, without a copy; some dtypes have no buffer of their own.
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()


def _refusal(folders: list[Path], steps: list[int], error: Exception) -> InputError:
    """Why the last of these checkpoints could not be read, and what helps."""
    newest = folders[-1]
    try:
        damage = _damage(newest, error)
    except OSError as unreadable:
        error, damage = unreadable, None
    if damage is None:
        return InputError(f"cannot read the checkpoint {newest} ({_cause(error)})")
    good = _newest_good(folders[:-1], steps)
    way_out = (
        "no earlier one is good: train again with --fresh"
        if good is None
        else f"remove {_listed(folders[steps.index(good) + 1 :])} to go back to step {good},"
        " which is good"
    )
    return InputError(f"the checkpoint {newest} is damaged ({damage}); {way_out}")


def _damage(folder: Path, error: Exception) -> str | None:
    """What is damaged in a checkpoint that gave an error; None where something else is wrong.

    Raises:
      OSError: a file in it cannot be read.
    """
    found = _digests_of_files(folder)
    try:
        written = json.loads((folder / FILES).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        written = None
    if not isinstance(written, dict):
        # From before files had digests, or their list is damaged too.
        damage = isinstance(error, OF_DAMAGE) and not isinstance(error, InputError)
        ours = damage and not OF_SURROUNDINGS.search(str(error))
        return first_line(error) if ours else None
    changed = [name for name in written if found.get(name) != written[name]]
    if not changed:
        return None
    what = "is not as it was saved" if changed[0] in found else "is missing"
    return f"{changed[0]} {what}{f', and {len(changed) - 1} more' if changed[1:] else ''}"


def _digests_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a checkpoint but the list of them, by its name in it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and name != FILES:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _cause(error: Exception) -> str:
    """What an error says, in one line and our user's words."""
    match error:
        case MemoryError():
            return "out of memory"
        case OSError(strerror=str(what), filename=str(name)):
            return f"{name}: {what}"
    # TensorStore gives the system's error as a number, behind all that it was doing.
    by_system = re.search(r"os_error_code='([0-9]+)'", str(error))
    return os.strerror(int(by_system[1])) if by_system else first_line(error)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; who reads it meanwhile finds all of it or no name."""
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    # What cannot be removed now is no checkpoint any more; the next training tries again.
    shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """A path to a folder that libraries take for nothing else, by a link if need be.

    Raises:
      InputError: neither it nor the folder for temporary files has such a path.
    """
    folder = folder.absolute()
    if PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="spak-jax-") as place:
        if not PLAIN_PATH.fullmatch(place):
            raise InputError(
                f"neither {folder} nor the folder for temporary files, {place}, has a plain name:"
                " set TMPDIR to one of letters, digits, `.`, `_`, `-` and `/`"
            )
        link = Path(place) / "run"
        link.symlink_to(folder, target_is_directory=True)
        yield link


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
    """A checkpoint, verified.

    Raises:
      Damaged: something in it is not what was saved.
      Exception: of any layer, for anything else.
    """
    _refuse_links(folder)
    with _opened(folder) as (checkpointer, place):
        config, digests = _verified(_description(checkpointer, place))
        wanted = [item for item in digests if optimizer or item == "weights"]
        arrays = _arrays(checkpointer, place, {item: digests[item] for item in wanted})
    return Restored(step, config, arrays["weights"], arrays.get("optimizer"))


def _require_saved(
    folder: Path, description: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises an error of any layer unless a checkpoint holds this description and these arrays."""
    small = {
        item: description["digests"][item]
        for item, named in arrays.items()
        if sum(np.asarray(array).nbytes for array in named.values()) <= READ_BACK
    }
    with _opened(folder) as (checkpointer, place):
        if _description(checkpointer, place) != description:
            raise Damaged("its description is not that which was saved")
        _arrays(checkpointer, place, small)
        for item in arrays.keys() - small.keys():
            found = ocp.PyTreeCheckpointHandler().metadata(place / item).tree
            shapes = lambda named: {name: (x.shape, x.dtype) for name, x in named.items()}  # noqa: E731
            if shapes(found) != shapes(arrays[item]):
                raise Damaged(f"its {item} are not those that were saved")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    """What reads a checkpoint, and a path to it."""
    with (
        _plainly_named(folder.parent) as parent,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        yield checkpointer, parent / folder.name


def _description(checkpointer: ocp.Checkpointer, place: Path) -> Any:
    args = ocp.args.Composite(description=ocp.args.JsonRestore())
    return checkpointer.restore(place, args=args)["description"]


def _arrays(
    checkpointer: ocp.Checkpointer, place: Path, digests: Mapping[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of items, whose digests are these."""
    # Not StandardRestore, which asks TensorStore to describe each array in JSON once more: that
    # loses two kilobytes a time (0.1.86).
    args = ocp.args.Composite(**{item: ocp.args.PyTreeRestore() for item in digests})
    arrays = checkpointer.restore(place, args=args) if digests else {}
    for item, written in digests.items():
        if digest(arrays[item]) != written:
            raise Damaged(f"its {item} are not those that were saved")
    return {item: arrays[item] for item in digests}


def _verified(description: Any) -> tuple[Config, dict[str, str]]:
    """The configuration in a description, and the digests of arrays by item.

    Raises:
      Damaged: it is not as it was saved.
      InputError: it is, but no configuration of today.
    """
    if not isinstance(description, dict) or not set(DESCRIBED[:2]) <= description.keys():
        raise Damaged("its description lacks the configuration or the digests")
    unknown = description.keys() - set(DESCRIBED)
    if unknown:
        raise Damaged(f"its description holds {', '.join(sorted(unknown))[:100]}")
    if "digest" in description and description["digest"] != _digest_of_text(description):
        raise Damaged("its configuration is not that which was saved")
    config, digests = (description[key] for key in DESCRIBED[:2])
    items = {"weights"}, {"weights", "optimizer"}
    if not isinstance(config, dict) or not isinstance(digests, dict) or set(digests) not in items:
        raise Damaged("its description lacks the configuration or the digests")
    return parse_config(config, "its configuration"), digests


def _refuse_links(folder: Path) -> None:
    """Raises `Damaged` where something in a checkpoint leads out of it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                raise Damaged(f"{name} is a link, which is not followed")

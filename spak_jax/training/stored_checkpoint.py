"""One checkpoint as it is stored: read and verified, or held against what was to be saved."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from spak_jax.command_line import InputError
from spak_jax.config import Config, parse_config
from spak_jax.training.named_arrays import digest

FILES = "files.json"
# What a description holds; those from before the configuration had a digest lack the last.
DESCRIBED = ("config", "digests", "digest")
# Bytes of weights, or of the optimizer's arrays, that a save reads back.
READ_BACK = 2**26

# A path that libraries take for nothing but a path. Others hold patterns (`[`, `*`), escapes, the
# beginning of an address (`gs:/`), or are no text.
PLAIN_PATH = re.compile(r"[A-Za-z0-9._/-]{1,1000}")


class Restored(NamedTuple):
    """One checkpoint: its step, configuration, weights and optimizer arrays by name."""

    step: int
    config: Config
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] | None


class Damaged(ValueError):
    """What stands in a checkpoint is not what was saved, or nothing that we save."""


def digests_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a checkpoint but the list of them, by its name in it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and name != FILES:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


@contextlib.contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
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


def digest_of_text(description: Mapping[str, Any]) -> str:
    """SHA-256 of a description's configuration and of the digests in it."""
    described = {key: description[key] for key in DESCRIBED[:2]}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read(folder: Path, step: int, optimizer: bool) -> Restored:
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


def require_saved(
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
        plainly_named(folder.parent) as parent,
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
    if "digest" in description and description["digest"] != digest_of_text(description):
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

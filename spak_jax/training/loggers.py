"""The metrics of a run: one JSON line for each compiled call of its training."""

import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spak_jax.command_line import Failure, InputError, write_file

METRICS = "metrics.jsonl"


class Line(BaseModel):
    """What one call tells: the step that it ended at, and means over its steps."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    loss: float
    step: Annotated[int, Field(ge=0, lt=2**31)]
    learning_rate: float
    seconds_per_step: float
    # At checkpoints.
    validation_loss: float | None = None


def read(run: Path) -> list[Line]:
    """The metrics of a run folder so far; none where it holds no file of them.

    Raises:
      InputError: the file cannot be read, or a line is none of ours. One that a kill cut short, the
        last, is left out.
    """
    path = run / METRICS
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read the metrics {path}: {error.strerror}") from None
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(Line.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"{path}, line {number}: {f'{key}: ' if key else ''}{problem['msg']}"
            ) from None
    return metrics


def cut(run: Path, step: int) -> None:
    """Leaves the lines up to a step alone: all that the checkpoint we go on from knew.

    Raises:
      InputError: as `read`, or the file cannot be written.
    """
    kept = [line for line in read(run) if line.step <= step]
    write_file(run / METRICS, "".join(map(_written, kept)))


def append(run: Path, line: Line) -> None:
    """Adds a line to a file that `cut` has left.

    Raises:
      Failure: the disk is full, or the folder gone or no longer writable.
    """
    try:
        # Not "a", which makes the file: where the folder was moved away during a save, Orbax has
        # made it anew, and the training would go on there without its lock.
        with (run / METRICS).open("r+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            file.write(_written(line))
    except OSError as error:
        raise Failure(f"cannot write {run / METRICS}: {error.strerror}") from None


def _written(line: Line) -> str:
    return json.dumps(line.model_dump(exclude_none=True)) + "\n"

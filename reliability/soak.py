"""One training for a long time, scored and saved every few seconds:
`python -m reliability.soak [CONFIG] [key.path=value ...] [--minutes N] [--json FILE]`.

What it looks at is its own process: does its memory grow, do files stay open, does the disk fill?
Everything happens in one process, as in a study: training from the last checkpoint and on, saving,
scoring, writing results.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from spak_jax import provenance
from spak_jax.command_line import console, run_program, write_file
from spak_jax.config import Config, read_config
from spak_jax.config_words import add_words, file_and_overrides
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.results import write_results
from spak_jax.evaluation.score import Settings, score
from spak_jax.training import run_folder
from spak_jax.training.loggers import METRICS
from spak_jax.training.loop import train

CHECKPOINTS_A_ROUND = 2
# What is there at first (programs, caches) is no growth.
WARM_UP = 0.2
MIB = 2**20


def soak(config: Config, minutes: float, run: Path) -> dict[str, Any]:
    """Trains, saves and scores for so long, in rounds.

    Args:
      config: of one seed; its `train.steps` must not be reached.
      minutes: how long.
      run: the run folder, which nothing is in yet.

    Returns:
      What `summary` makes of the rounds, and each of them.
    """
    process, started = psutil.Process(), time.monotonic()
    settings = Settings.of(config.evaluation)
    rounds: list[dict[str, float]] = []
    while time.monotonic() - started < 60 * minutes:
        step = (len(rounds) + 1) * CHECKPOINTS_A_ROUND * config.train.checkpoint_every
        (state,) = train(config, run, step)
        loaded = LoadedModel(config, state.weights, step)
        write_results(run / run_folder.RESULTS, score(loaded, settings, run))
        rounds.append(
            {
                "seconds": time.monotonic() - started,
                "step": step,
                "memory": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "checkpoint_bytes": _bytes(run / run_folder.CHECKPOINTS),
                "metrics_bytes": (run / METRICS).stat().st_size,
            }
        )
    return summary(rounds) | {"rounds": rounds}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """How much the process grew, by a straight line through all rounds but the first ones."""
    later = rounds[int(WARM_UP * len(rounds)) :]
    hours = np.array([each["seconds"] for each in later]) / 3600
    slope = lambda key: (  # noqa: E731
        float(np.polyfit(hours, [each[key] for each in later], 1)[0]) if len(later) > 2 else 0.0
    )
    return {
        "minutes": rounds[-1]["seconds"] / 60,
        "steps": rounds[-1]["step"],
        "checkpoints": len(rounds) * CHECKPOINTS_A_ROUND,
        "scorings": len(rounds),
        "memory_first": later[0]["memory"],
        "memory_last": later[-1]["memory"],
        "memory_most": max(each["memory"] for each in rounds),
        "memory_an_hour": slope("memory"),
        "files_first": later[0]["files"],
        "files_last": later[-1]["files"],
        "threads_first": later[0]["threads"],
        "threads_last": later[-1]["threads"],
        "checkpoint_bytes_first": later[0]["checkpoint_bytes"],
        "checkpoint_bytes_most": max(each["checkpoint_bytes"] for each in later),
        "metrics_bytes_an_hour": slope("metrics_bytes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reliability.soak", description="Train for long and see what grows."
    )
    add_words(parser, default="quickstart")
    parser.add_argument("--minutes", type=float, default=30, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen")
    arguments = parser.parse_intermixed_args()
    config = read_config(*file_and_overrides(arguments))
    with tempfile.TemporaryDirectory() as folder:
        found = soak(config, arguments.minutes, Path(folder) / "run")
    found |= provenance.where_and_when()
    console.print(
        f"{found['minutes']:.1f} minutes, {found['checkpoints']:,} checkpoints,"
        f" {found['scorings']:,} scorings: memory {found['memory_first'] / MIB:,.0f} to"
        f" {found['memory_last'] / MIB:,.0f} MiB ({found['memory_an_hour'] / MIB:+,.1f} an hour),"
        f" open files {found['files_first']} to {found['files_last']}, checkpoints at most"
        f" {found['checkpoint_bytes_most'] / MIB:.2f} MiB"
    )
    if arguments.json:
        write_file(arguments.json, json.dumps(found, indent=1) + "\n")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    run_program(main)

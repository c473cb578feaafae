"""What more devices bring:
`python -m benchmarks.scaling CONFIG ... [key.path=value ...] [--json FILE]`.

Steps of each configuration are timed on one device and on all: with the batch of each device as it
is, with the batch of all devices as it is, and with a seed on each device. All programs take turns,
so that a device that grows hot slows each of them.
"""

import argparse
import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spak_jax import models, provenance
from spak_jax.command_line import (
    InputError,
    Table,
    console,
    progress,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config import Config, parse_config, read_config
from spak_jax.config_sections import Parallel
from spak_jax.config_words import add_words, files_and_overrides
from spak_jax.training import step

ROUNDS = 7
SECONDS_A_ROUND = 0.5
ONE = "one device"
# How the work of one device becomes that of several, and how many times the work it is.
WAYS = {
    "fixed batch per device": lambda n: ({"batch": n}, {"data": n}, n),
    "fixed global batch": lambda n: ({}, {"data": n}, 1),
    "a seed per device": lambda n: ({"seeds": n}, {"seeds": n}, n),
}


def measure(config: Config, devices: int) -> dict[str, Any]:
    """Times of training steps on one device and on several.

    Args:
      config: of one seed, on one device.
      devices: how many.

    Returns:
      JSON: by way, milliseconds a step (`median`, `least`, `most`), and the efficiency: the work
      done in a time, over that of as many single devices.
    """
    configs = {ONE: config} | {way: spread(config, way, devices) for way in WAYS}
    # Compiled at the same time, as one alone keeps few cores busy.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        programs = dict(zip(configs, threads.map(_program, configs.values()), strict=True))
    seconds = {way: [] for way in programs}
    for _ in range(ROUNDS):
        for way, run in programs.items():
            seconds[way].append(run())
    milliseconds = {
        way: {
            "median": 1e3 * statistics.median(each),
            "least": 1e3 * min(each),
            "most": 1e3 * max(each),
        }
        for way, each in seconds.items()
    }
    one = milliseconds[ONE]["median"]
    efficiency = {
        way: work * one / (devices * milliseconds[way]["median"])
        for way, (_, _, work) in ((way, of(devices)) for way, of in WAYS.items())
    }
    return {
        "config": config.name,
        "parameters": models.parameter_count(
            jax.eval_shape(lambda: step.initial_state(config)).weights
        ),
        "batch": [config.train.batch, config.data.row_length],
        "milliseconds_a_step": milliseconds,
        "efficiency": efficiency,
    }


def spread(config: Config, way: str, devices: int) -> Config:
    """The configuration of one device's training, spread over several in one of the `WAYS`."""
    times, over, _ = WAYS[way](devices)
    values = config.model_dump(mode="json")
    for key, factor in times.items():
        values["train"][key] *= factor
    return parse_config(values | {"parallel": over}, f"{config.name}, {way}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="Time training on one device and on all."
    )
    add_words(parser, several=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    arguments = parser.parse_intermixed_args()
    paths, overrides = files_and_overrides(arguments)
    configs = [read_config(path, overrides) for path in paths]
    devices = jax.local_device_count()
    if devices < 2:
        raise InputError(f"there is one device, {provenance.device_name()}: scaling needs several")
    for config in configs:
        if config.train.seeds > 1 or config.parallel != Parallel():
            raise InputError(
                "train.seeds and parallel: the devices are chosen here, leave them out"
            )
    if arguments.json:
        writable_folder(arguments.json.parent)
    found = {
        **provenance.where_and_when(),
        "devices": devices,
        "overrides": overrides,
        "rounds": ROUNDS,
        "configs": [],
    }
    for config in configs:
        with progress(f"timing {config.name}"):
            found["configs"].append(measure(config, devices))
        show(found, found["configs"][-1])
        # After each: the rest may take long, or fail.
        if arguments.json:
            write_file(arguments.json, json.dumps(found, indent=1) + "\n")


def show(found: dict[str, Any], measured: dict[str, Any]) -> None:
    table = Table(
        title=f"{measured['config']} on {found['devices']} x {found['device']},"
        f" batch {measured['batch'][0]} x {measured['batch'][1]}"
    )
    for column in ("", "ms a step", "least - most", "efficiency"):
        table.add_column(column, justify="right" if column else "left")
    for way, times in measured["milliseconds_a_step"].items():
        efficiency = measured["efficiency"].get(way)
        table.add_row(
            way,
            f"{times['median']:.2f}",
            f"{times['least']:.2f} - {times['most']:.2f}",
            "" if efficiency is None else f"{efficiency:.1%}",
        )
    console.print(table)


def _program(config: Config) -> Callable[[], float]:
    """A function that takes some steps and returns the seconds of one."""
    run_steps = step.compiled_steps(config)
    state, dataset = step.init_sharded_state(config), step.sharded_dataset(config)

    def run(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        state, _ = jax.block_until_ready(run_steps(state, dataset, np.int32(count)))
        return (time.perf_counter() - started) / count

    run(1)
    count = None

    def round_of_steps() -> float:
        nonlocal count
        # Not while others compile: how many steps fill a round would be found too few.
        if count is None:
            count = max(1, min(int(SECONDS_A_ROUND / run(2)), config.train.steps_per_call))
        return run(count)

    return round_of_steps


if __name__ == "__main__":
    run_program(main)

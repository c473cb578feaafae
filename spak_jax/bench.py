"""How long a training step takes:
`python -m spak_jax.bench CONFIG [key.path=value ...] [--attention NAME ...] [--json FILE]`.
"""

import argparse
import datetime
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.table import Table

from pallas_kernels import IMPLEMENTATIONS, choose, timing
from spak_jax import evaluate, model
from spak_jax.command_line import InputError, console, run_program, writable_folder, write_file
from spak_jax.config import Config, read_config
from spak_jax.train import initial_state, make_supply, make_training

ROUNDS = 7
SECONDS_A_ROUND = 0.5
LONGEST_ROUND = 500


def step_times(config: Config, attentions: list[str]) -> dict[str, tuple[float, float, float]]:
    """Seconds a training step with each implementation of attention, quartiles.

    Each is compiled once and runs some hundred steps in one call, as a training does; they take
    turns, and start from the same weights.
    """
    state, supply = initial_state(config), make_supply(config)
    most = min(LONGEST_ROUND, config.train.steps_per_call)
    programs = {}
    for name in attentions:
        run_steps = jax.jit(make_training(config, name))
        executable = run_steps.lower(state, supply, jnp.int32(0)).compile()

        def steps(count: int, executable=executable) -> None:
            jax.block_until_ready(executable(state, supply, jnp.int32(count)))

        steps(1)
        start = time.perf_counter()
        steps(2)
        pace = (time.perf_counter() - start) / 2
        count = max(1, min(round(SECONDS_A_ROUND / pace), most))
        programs[name] = timing.Program(functools.partial(steps, count), count)
    return timing.medians(programs, ROUNDS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.bench", description="Time the training step of a configuration."
    )
    parser.add_argument("config", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to it")
    parser.add_argument(
        "--attention",
        action="append",
        choices=IMPLEMENTATIONS,
        help="an implementation of attention; repeatable (default: what training takes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times")
    arguments = parser.parse_intermixed_args()
    config = read_config(arguments.config, arguments.overrides)
    if arguments.json:
        writable_folder(arguments.json.parent)
    names = arguments.attention or [_default_attention(config)]
    try:
        seconds = step_times(config, names)
    except ValueError as error:
        raise InputError(f"--attention: {error}") from None
    results = {
        "config": config.name,
        "overrides": arguments.overrides,
        "device": evaluate.device_name(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "commit": evaluate.commit(),
        "batch": [config.train.batch, config.data.row_length],
        "milliseconds_a_step": {
            name: dict(
                zip(
                    ("low", "median", "high"),
                    (1e3 * x for x in values),
                    strict=True,
                )
            )
            for name, values in seconds.items()
        },
    }
    table = Table("attention", "ms a step, median", "quartiles")
    for name, times in results["milliseconds_a_step"].items():
        quartiles = f"{times['low']:.3f} to {times['high']:.3f}"
        table.add_row(name, f"{times['median']:.3f}", quartiles)
    console.print(
        f"{config.name}: {config.train.batch} x {config.data.row_length} tokens a step on"
        f" {results['device']}"
    )
    console.print(table)
    if arguments.json:
        write_file(arguments.json, json.dumps(results, indent=1) + "\n")
        console.print(f"results: {arguments.json}")


def _default_attention(config: Config) -> str:
    architecture = config.model
    return choose(
        config.data.row_length,
        architecture.width // architecture.heads,
        model.compute_dtype(architecture.dtype),
        plain=architecture.dropout == 0,
    ).implementation


if __name__ == "__main__":
    run_program(main)

"""Time to a hundred digits:
`python -m benchmarks.race [CONFIG] [key.path=value ...] [--json FILE]`.

Trains a configuration from nothing, stops every so many steps to score additions of 100 digits, and
ends as soon as 99.9% of them are right. The time counts from the start of the process, compiling
included; beside it stands what the training steps alone took. No run folder is written.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from spak_jax import jax_settings, tasks
from spak_jax.command_line import (
    Failure,
    InputError,
    check_range,
    console,
    progress,
    run_program,
    write_file,
)
from spak_jax.config import Config, read_config
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.config_words import add_words, file_and_overrides
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.evaluation.statistics import summary
from spak_jax.training.step import TrainState, compiled, init_sharded_state, sharded_dataset

DIGITS, ACCURACY = 100, 0.999
EXAMPLES = 10_000
# Scored first, and the others only where these look good.
FIRST_EXAMPLES = 256


@jax_settings.fixed()
def race(config: Config, digits: int, every: int) -> dict[str, Any]:
    """Trains until `ACCURACY` of additions of `digits` digits are right.

    Args:
      config: of one seed.
      digits: of both operands.
      every: training steps between two scorings.

    Returns:
      Steps and seconds to there, the score, and where and when.

    Raises:
      Failure: the training ended before that.
    """
    state, dataset = init_sharded_state(config), sharded_dataset(config)
    run_steps, _ = compiled(config)
    settings = Settings((digits,), EXAMPLES, config.evaluation.seed)
    problems = tasks.of(config.data).sample_exact(jax.random.key(1), digits, EXAMPLES)
    few = jax.tree.map(lambda array: array[:FIRST_EXAMPLES], problems)
    training = scoring = 0.0
    with progress(config.name, config.train.steps, unit="steps") as shown:
        while int(state.step) < config.train.steps:
            before, started = int(state.step), time.perf_counter()
            state = _advance(run_steps, state, dataset, every, config)
            training += time.perf_counter() - started
            started = time.perf_counter()
            scorer = Scorer(LoadedModel(config, state.weights, 0), settings)
            right = scorer(few).correct.mean()
            if right >= ACCURACY:
                outcome = scorer(problems)
                right = outcome.correct.mean()
            scoring += time.perf_counter() - started
            shown.advance(int(state.step) - before)
            console.print(f"step {int(state.step):,}: {right:.2%} of {digits} digits right")
            if right >= ACCURACY:
                loaded = LoadedModel(config, state.weights, int(state.step))
                return loaded.describe() | {
                    "digits": digits,
                    **summary(outcome),
                    "seconds": time.time() - psutil.Process().create_time(),
                    "training_seconds": training,
                    "scoring_seconds": scoring,
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
    raise Failure(f"{ACCURACY:.1%} of {digits} digits not reached in {config.train.steps:,} steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race", description="Train until 100-digit additions are right."
    )
    add_words(parser, default="quickstart")
    parser.add_argument("--digits", type=int, default=DIGITS, help="(%(default)s)")
    parser.add_argument(
        "--every", type=int, default=100, help="steps between scorings (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    arguments = parser.parse_intermixed_args()
    check_range("--digits", arguments.digits, 1, MAX_LENGTH)
    check_range("--every", arguments.every, 1, 1_000_000)
    config = read_config(*file_and_overrides(arguments))
    if config.train.seeds > 1:
        raise InputError(f"train.seeds = {config.train.seeds}: a race is run by one seed")
    # The time is one with compiling in it, the second time too.
    jax.config.update("jax_enable_compilation_cache", False)
    result = race(config, arguments.digits, arguments.every)
    console.print(
        f"{config.system}, {result['parameters']:,} parameters, on {result['device']}:"
        f" {result['accuracy']:.2%} of {arguments.digits} digits right after {result['step']:,}"
        f" steps, {result['seconds']:.1f} s from the start of the process,"
        f" {result['training_seconds']:.1f} s of them training"
    )
    if arguments.json:
        write_file(arguments.json, json.dumps(result, indent=1) + "\n")


def _advance(run_steps, state: TrainState, dataset, count: int, config: Config) -> TrainState:
    """The state `count` steps on, or at the last step."""
    last = min(int(state.step) + count, config.train.steps)
    while int(state.step) < last:
        steps = min(last - int(state.step), config.train.steps_per_call)
        state, _ = run_steps(state, dataset, jnp.int32(steps))
    return jax.block_until_ready(state)


if __name__ == "__main__":
    run_program(main)

"""How fast a configuration trains and scores:
`python -m benchmarks.models CONFIG [key.path=value ...] [--attention NAME ...] [--json FILE]`; with
`--inference`, how fast a looped model infers (`inference`); with `--generation`, how fast a
model writes answers (`generation`).

Beside it, in turns, where PyTorch and a GPU are at hand, a peer: the same model, trained and run as
its users would (`torch_peer`). And where the time goes: the kernels of a step. With `--target`,
nothing is timed: memory and a roofline estimate for a GPU that is not there (`roofline`).
"""

import argparse
import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generation, inference, profiling
from pallas_kernels import IMPLEMENTATIONS, choose
from pallas_kernels.targets import TARGETS
from pallas_kernels.tuning import aot, timing
from spak_jax import models, provenance, tasks
from spak_jax.command_line import (
    InputError,
    Table,
    console,
    progress,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config import Config, read_config
from spak_jax.config_sections import Architecture, Parallel
from spak_jax.config_words import add_words, file_and_overrides
from spak_jax.data import make_dataset, training_batch
from spak_jax.evaluation.batching import padded_length, rows_per_call
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.models import flops
from spak_jax.specs import roofline
from spak_jax.training.runs import per_seed_configs
from spak_jax.training.step import initial_state, make_training

ROUNDS = 7
SECONDS_A_ROUND = 0.5
LONGEST_ROUND = 500
PROFILED_STEPS = 3
SCORED_DIGITS = 12
# Batches that the peer finds on its GPU, in turn.
PEER_BATCHES = 8
PEER = "torch"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Time a configuration's training and scoring.",
    )
    add_words(parser)
    parser.add_argument(
        "--attention",
        action="append",
        choices=IMPLEMENTATIONS,
        help="an implementation of attention; repeatable (default: what training takes)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--inference", action="store_true", help="all loops in one launch against loop by loop"
    )
    instead.add_argument(
        "--generation", action="store_true", help="writing with caches against recomputing"
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="estimate for this GPU instead, without having it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    arguments = parser.parse_intermixed_args()
    path, overrides = file_and_overrides(arguments)
    config = read_config(path, overrides)
    if config.parallel != Parallel():
        raise InputError(
            "parallel: one device is timed here; `python -m benchmarks.scaling` has more"
        )
    if not isinstance(config.model, Architecture):
        raise InputError(f"{config.name} is {config.model.described}: transformers are timed here")
    if arguments.json:
        writable_folder(arguments.json.parent)
    if (arguments.inference or arguments.generation) and arguments.attention:
        raise InputError("--attention: --inference and --generation compare what they compare")
    if arguments.generation and arguments.target:
        raise InputError("--target: --generation is measured, not estimated")
    results = {"config": config.name, "overrides": overrides}
    if arguments.target:
        aot.touch_no_gpu()
        estimating = inference if arguments.inference else roofline
        try:
            with progress("compiling"):
                results |= estimating.estimate(config, arguments.target)
        except aot.Unavailable as error:
            raise InputError(f"--target {arguments.target}: {error}") from None
        (inference.show_estimate if arguments.inference else show_estimate)(results)
    elif arguments.inference or arguments.generation:
        timed = inference if arguments.inference else generation
        with progress("timing"):
            results |= timed.measure(config)
        timed.show(results)
    else:
        try:
            with progress("timing"):
                results |= measure(config, arguments.attention or [_default_attention(config)])
        except ValueError as error:
            raise InputError(f"--attention: {error}") from None
        show(results)
    if arguments.json:
        write_file(arguments.json, json.dumps(results, indent=1) + "\n")
        console.print(f"results: {arguments.json}")


def measure(config: Config, attentions: list[str]) -> dict[str, Any]:
    """Times of training steps and scoring, with each implementation of attention and the peer.

    Raises:
      ValueError: an implementation that cannot train this configuration.
    """
    steps, memory = {}, {}
    for name in attentions:
        steps[name], memory[name] = _training_steps(config, name)
    scoring = {"ours": _scoring_passes(config)}
    missing = None
    try:
        steps[PEER], scoring[PEER] = _peer(config)
    except _NoPeer as reason:
        missing = str(reason)
    seeds = config.train.seeds
    # The peer trains one seed.
    of_seeds = {name: 1 if name == PEER else seeds for name in steps}
    milliseconds = _milliseconds(steps)
    passes = _milliseconds(scoring)
    tokens = config.train.batch * config.data.row_length
    operations = flops.operations_a_step(config)
    results = {
        **provenance.where_and_when(),
        "batch": [config.train.batch, config.data.row_length],
        "seeds": seeds,
        "milliseconds_a_step": milliseconds,
        "milliseconds_a_seed": {
            name: times["median"] / of_seeds[name] for name, times in milliseconds.items()
        },
        "tokens_a_second": {
            name: tokens * of_seeds[name] / times["median"] * 1e3
            for name, times in milliseconds.items()
        },
        "operations_a_step": operations,
        "temporary_bytes": memory,
        "scored_problems_a_second": {
            name: _scored_rows(config) / times["median"] * 1e3 for name, times in passes.items()
        },
    }
    if missing:
        results["no_peer"] = missing
    if jax.default_backend() == "gpu":
        product = timing.product_speed(jnp.bfloat16)
        results["product_operations_a_second"] = product
        results["floor_milliseconds_a_seed"] = 1e3 * operations / product
        run = functools.partial(steps[attentions[0]], PROFILED_STEPS)
        results["kernels"] = profiling.kernels(run, PROFILED_STEPS)
    return results


def show(results: dict[str, Any]) -> None:
    """Tables for people."""
    batch = " x ".join(map(str, results["batch"]))
    console.print(f"{results['config']}: {batch} tokens a step on {results['device']}")
    table = Table("", "ms a step", "quartiles", "ms a seed", "million tokens/s", "TFLOP/s")
    for name, times in results["milliseconds_a_step"].items():
        seconds = results["milliseconds_a_seed"][name] / 1e3
        table.add_row(
            name if name == PEER else f"ours, attention {name}",
            f"{times['median']:.3f}",
            f"{times['low']:.3f} to {times['high']:.3f}",
            f"{1e3 * seconds:.3f}",
            f"{results['tokens_a_second'][name] / 1e6:.2f}",
            f"{results['operations_a_step'] / seconds / 1e12:.1f}",
        )
    console.print(table)
    if "floor_milliseconds_a_seed" in results:
        console.print(
            f"at the speed of a large product ({results['product_operations_a_second'] / 1e12:.0f}"
            f" TFLOP/s) a seed's step would take {results['floor_milliseconds_a_seed']:.3f} ms"
        )
    for name, bytes_held in results["temporary_bytes"].items():
        console.print(f"attention {name}: {bytes_held / 2**20:,.0f} MiB beside weights and data")
    for name, rate in results["scored_problems_a_second"].items():
        console.print(f"scoring, {name}: {rate:,.0f} problems of {SCORED_DIGITS} digits a second")
    if "no_peer" in results:
        console.print(f"no PyTorch peer: {results['no_peer']}")
    if "kernels" in results:
        table = Table("kernel", "a step", "us", "us each")
        for kernel in results["kernels"][:25]:
            table.add_row(
                kernel["name"],
                f"{kernel['count']:.1f}",
                f"{kernel['microseconds']:.0f}",
                f"{kernel['microseconds'] / kernel['count']:.2f}",
            )
        table.add_row(
            "all",
            f"{sum(kernel['count'] for kernel in results['kernels']):.0f}",
            f"{sum(kernel['microseconds'] for kernel in results['kernels']):.0f}",
            "",
        )
        console.print(table)


def show_estimate(results: dict[str, Any]) -> None:
    """What `roofline.estimate` found, in words."""
    console.print(
        f"{results['config']} on {results['chip']}, which is not here: compiled, it holds"
        f" {results['bytes_held'] / 2**20:,.0f} of {results['memory_bytes'] / 2**20:,.0f} MiB."
        f" Estimate, not a measurement: a step takes at least"
        f" {results['least_milliseconds_by_operations']:.2f} ms for its operations and"
        f" {results['least_milliseconds_by_bytes']:.2f} ms for its memory."
    )


class _NoPeer(Exception):
    """Why there is no peer to compare with."""


def _milliseconds(runs: dict[str, Callable[[int], None]]) -> dict[str, dict[str, float]]:
    """Quartiles of each, taking turns; a run takes a count and returns when that is done."""
    programs = {}
    for name, run in runs.items():
        run(1)
        start = time.perf_counter()
        run(2)
        pace = (time.perf_counter() - start) / 2
        count = max(1, min(round(SECONDS_A_ROUND / pace), LONGEST_ROUND))
        programs[name] = timing.Program(functools.partial(run, count), count)
    return timing.quartiles(programs, ROUNDS, 1e3)


def _training_steps(config: Config, attention: str) -> tuple[Callable[[int], None], int]:
    """A function that takes training steps, always from the same state, and its memory."""
    state, dataset = initial_state(config), make_dataset(config.data)
    run_steps = jax.jit(make_training(config, attention))
    executable = run_steps.lower(state, dataset, jnp.int32(0)).compile()

    def run(count: int) -> None:
        # One call of the program takes so many at most.
        most = config.train.steps_per_call
        for start in range(0, count, most):
            jax.block_until_ready(executable(state, dataset, jnp.int32(min(most, count - start))))

    return run, executable.memory_analysis().temp_size_in_bytes


def _scoring_passes(config: Config) -> Callable[[int], None]:
    """A function that scores batches of problems, as `evaluate` does."""
    one = per_seed_configs(config)[0]
    scorer = Scorer(
        LoadedModel(one, initial_state(one).weights, 0), Settings((SCORED_DIGITS,), 1, 0)
    )
    rows = _scored_rows(config)
    problems = scorer.task.sample_exact(jax.random.key(0), SCORED_DIGITS, rows)

    def run(count: int) -> None:
        # All in one call, as in `evaluate`: batches are prepared while others are scored.
        scorer(jax.tree.map(lambda x: np.resize(x, (count * rows, *x.shape[1:])), problems))

    return run


def _peer(config: Config) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Training steps and scoring passes in PyTorch."""
    try:
        from benchmarks import torch_peer
    except ImportError as error:
        raise _NoPeer(f"PyTorch is not installed ({error})") from None
    if not torch_peer.torch.cuda.is_available():
        raise _NoPeer(f"PyTorch {importlib.metadata.version('torch')} sees no GPU")
    dataset = make_dataset(config.data)
    batches = []
    for key in jax.random.split(jax.random.key(0), PEER_BATCHES):
        batch = training_batch(key, config.data, config.train.batch, dataset.training)
        weights = batch.answer / batch.answer.sum()
        batches.append(tuple(map(np.asarray, (batch.tokens, batch.targets, weights))))
    task = tasks.of(config.data)
    vocabulary = len(task.vocabulary)
    problems = task.sample_exact(jax.random.key(0), SCORED_DIGITS, _scored_rows(config))
    rows = task.batch(problems, config.data.row_length)
    return (
        torch_peer.training_steps(config, vocabulary, batches),
        torch_peer.scoring_passes(config, vocabulary, np.asarray(rows.tokens)),
    )


def _scored_rows(config: Config) -> int:
    """Problems that one pass scores."""
    return rows_per_call(padded_length(SCORED_DIGITS, tasks.of(config.data)))


def _default_attention(config: Config) -> str:
    architecture = config.model
    return choose(
        config.data.row_length,
        architecture.width // architecture.heads,
        models.compute_dtype(architecture.dtype),
        plain=architecture.dropout == 0,
    ).implementation


if __name__ == "__main__":
    # PyTorch shares the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run_program(main)

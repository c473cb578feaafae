"""What a loop takes of rows with a window, against the same loop over every pair of places:
`python -m benchmarks.windows [CONFIG] [--places N ...] [--rounds N] [--json FILE]`.

The model of a configuration with `model.window = true`, configs/parity.toml unless another is
named, runs some loops over rows whose ids count from 2, 8,192 tokens at once; and beside it the
same model with `model.window = false`, which attends to all of them. On a GPU both take the
kernels; a CPU takes plain `jnp`. Weights are initial ones, on which times do not depend.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.programs import progress
from pallas_kernels.tuning import timing
from spak_jax import models, provenance
from spak_jax.command_line import InputError, Table, console, run_program
from spak_jax.config import Config

PLACES = (128, 1024, 8192)
# Of a batch: one row of the longest.
TOKENS = 8192
# Of a program: what comes before and after them is spread over as many.
LOOPS, LOOPS_OF_A_CPU = 128, 4
WINDOW, FULL = "window", "every pair"


def measure(configs: dict[str, Config], places: int, rounds: int) -> dict[str, Any]:
    """Quartiles of the milliseconds that a loop of each configuration takes, taking turns."""
    rows = max(1, TOKENS // places)
    loops = LOOPS if jax.default_backend() == "gpu" else LOOPS_OF_A_CPU
    programs = {name: _program(config, rows, places, loops) for name, config in configs.items()}
    return {
        "places": places,
        "rows": rows,
        "loops": loops,
        "rounds": rounds,
        "milliseconds": timing.quartiles(programs, rounds, 1e3),
    }


def _program(config: Config, rows: int, places: int, loops: int) -> timing.Program:
    """A compiled program of some loops, as answers in one pass run them; a call is a loop."""
    graph, state = nnx.split(models.build(config, jax.random.key(0)))
    tokens = jnp.ones((rows, places), jnp.int32)
    ids = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32) + 2, tokens.shape)

    @jax.jit
    def logits(state, tokens, ids, loops):
        return nnx.merge(graph, state)(tokens, position_ids=ids, loops=loops)

    given = state, tokens, ids, jnp.full(rows, loops, jnp.int32)
    executable = logits.lower(*given).compile()
    return timing.Program(lambda: jax.block_until_ready(executable(*given)), loops)


def table(results: dict[str, Any]) -> Table:
    """The results as a table: a row for each number of places."""
    drawn = Table("rows x places", WINDOW, FULL, "times as fast")
    for entry in results["measurements"]:
        medians = [entry["milliseconds"][name]["median"] for name in (WINDOW, FULL)]
        drawn.add_row(
            f"{entry['rows']} x {entry['places']:,}",
            *(f"{median:.3f}" for median in medians),
            f"{medians[1] / medians[0]:.2f}",
        )
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.windows", description=__doc__)
    parser.add_argument("config", nargs="?", default="parity", help="parity unless given")
    parser.add_argument(
        "--places", type=int, action="append", metavar="N", help="of a row; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each, 10 unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    arguments = parser.parse_args()
    for name, numbers, least in (
        ("--rounds", [arguments.rounds], 2),
        ("--places", arguments.places or (), 1),
    ):
        for number in numbers:
            if number < least:
                parser.error(f"{name} {number}: must be at least {least}")
    config = Config.from_file(arguments.config)
    if not getattr(config.model, "window", False) or not hasattr(config.model, "loops"):
        raise InputError(f"{arguments.config}: benchmarks.windows is for loops with model.window")
    if arguments.json:
        try:
            # Said now, not after minutes of timing.
            arguments.json.open("a").close()
        except OSError as error:
            parser.error(f"--json {arguments.json}: cannot be written ({error.strerror})")
    configs = {WINDOW: config, FULL: Config.from_file(arguments.config, "model.window=false")}
    results = {
        "config": config.name,
        **provenance.where_and_when(),
        "dtype": models.compute_dtype(config.model.dtype).name,
        "measurements": [],
    }
    cases = arguments.places or PLACES
    with progress("timing", len(cases), unit="lengths") as bar:
        for places in cases:
            results["measurements"].append(measure(configs, places, arguments.rounds))
            bar.advance()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))
    console.print(
        f"Milliseconds a loop: {results['config']}, {results['dtype']} on {results['device']}."
    )


if __name__ == "__main__":
    run_program(main)

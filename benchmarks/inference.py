"""How fast a looped model infers: all loops in one launch, loop by loop, and by XLA alone.

`python -m benchmarks.models CONFIG --inference`: latency of one batch at several numbers of loops,
and throughput of many rows at the trained number. Weights are initial ones: no token halts, and
times do not depend on them. With `--target` nothing is timed: what the kernel takes of a GPU that
is not there, and the least time by its published speed.
"""

import contextlib
import datetime
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import targets
from pallas_kernels.tuning import aot, timing
from pallas_kernels.tuning.cases import LOOPED, Case
from pallas_kernels.tuning.shapes import Shape
from spak_jax import models, provenance, tasks
from spak_jax.command_line import InputError, Table, console
from spak_jax.config import Config
from spak_jax.config_sections import LoopedModel
from spak_jax.models import flops
from spak_jax.registry import POSITIONS

ROWS, LENGTH = 128, 64
LOOPS = (12, 24, 30)
MANY_ROWS = 10_000
ROUNDS = 7
# Passes of a program that times latency: the host's cost of starting it is spread thin.
PASSES = 10
LAUNCHED, SCANNED, PLAIN = "one launch", "loop by loop, our kernels", "XLA alone"


def measure(config: Config) -> dict[str, Any]:
    """Times of every contender that runs here.

    Raises:
      InputError: the model does not loop.
    """
    _check_loops(config)
    dtype = models.compute_dtype(config.model.dtype)
    results = {
        **provenance.where_and_when(),
        "dtype": dtype.name,
        "weight_bytes_a_loop": flops.weights_of_a_layer(config) * dtype.itemsize,
        "latency": [_timed(config, ROWS, loops, PASSES) for loops in LOOPS],
        "throughput": _timed(config, MANY_ROWS, config.model.loops, 1),
    }
    if jax.default_backend() == "gpu":
        product = timing.product_speed(dtype)
        results["product_operations_a_second"] = product
        for entry in (*results["latency"], results["throughput"]):
            entry["floor_milliseconds"] = 1e3 * entry["operations"] / product
    return results


def show(results: dict[str, Any]) -> None:
    """A table for people: a row for each number of rows and loops."""
    table = Table("rows x tokens", "loops", "floor, ms")
    names = list(results["throughput"]["milliseconds"])
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    for heading in ("times as fast as loop by loop", "rows/s", "weights, TB/s"):
        table.add_column(heading, justify="right")
    for entry in (*results["latency"], results["throughput"]):
        medians = {name: times["median"] for name, times in entry["milliseconds"].items()}
        best = medians.get(LAUNCHED) or min(medians.values())
        floor = entry.get("floor_milliseconds")
        slower = medians.get(SCANNED)
        # Each row's program reads all weights once a loop.
        streamed = entry["rows"] * entry["loops"] * results["weight_bytes_a_loop"]
        table.add_row(
            f"{entry['rows']:,} x {entry['length']}",
            str(entry["loops"]),
            "-" if floor is None else f"{floor:.3f}",
            *(f"{medians[name]:.3f}" for name in names),
            f"{slower / best:.2f}" if slower and LAUNCHED in medians else "-",
            f"{1e3 * entry['rows'] / best:,.0f}",
            f"{streamed / best / 1e9:.2f}" if LAUNCHED in medians else "-",
        )
    console.print(table)
    console.print(f"{results['dtype']} on {results['device']}")
    for name, reason in results["throughput"]["missing"].items():
        console.print(f"no {name}: {reason}")


def estimate(config: Config, target: str) -> dict[str, Any]:
    """What the kernel takes of a target, and the least time of its operations there.

    Raises:
      InputError: the model does not loop.
      aot.Unavailable: what compiling for another GPU needs is not installed.
    """
    _check_loops(config)
    architecture, chip = config.model, targets.TARGETS[target]
    with targets.compiling_for(target):
        dtype = models.compute_dtype(architecture.dtype)
    biased = POSITIONS.get(architecture.positions).has_ids
    case = Case(
        LOOPED,
        Shape(ROWS, LENGTH, architecture.heads, architecture.width // architecture.heads),
        dtype.name,
        rope=not biased,
        clip=1 if biased else None,
        backward=False,
        hidden=models.hidden_width(architecture),
    )
    [report] = aot.measure([target], [case])
    # A float32 product is three in tf32, each at half the speed of bfloat16.
    speed = chip.products / (1 if dtype == jnp.bfloat16 else 6)
    seconds = {
        loops: flops.operations_a_pass(config, ROWS, LENGTH, loops) / speed for loops in LOOPS
    }
    return {
        "estimate": True,
        "target": target,
        "chip": chip.chip,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "commit": provenance.commit(),
        "batch": [ROWS, LENGTH],
        "weight_bytes_a_loop": flops.weights_of_a_layer(config) * dtype.itemsize,
        "kernel": report.as_json(),
        "least_milliseconds_by_operations": {str(n): 1e3 * s for n, s in seconds.items()},
    }


def show_estimate(results: dict[str, Any]) -> None:
    """What `estimate` found, in words."""
    kernel = results["kernel"]
    took = "does not compile" if kernel["registers"] is None else (
        f"takes {kernel['registers']} registers a thread, spills {kernel['spilled_bytes']} B and"
        f" takes {kernel['shared_memory_bytes']} of {kernel['shared_memory_limit_bytes']} B of"
        " shared memory"
    )  # fmt: skip
    problem = "" if kernel["ok"] else f" ({kernel['problem']})"
    least = ", ".join(
        f"{milliseconds:.2f} ms at {loops} loops"
        for loops, milliseconds in results["least_milliseconds_by_operations"].items()
    )
    rows, length = results["batch"]
    console.print(
        f"{results['config']} on {results['chip']}, which is not here: compiled, all loops in one"
        f" launch {took}{problem}. Estimate, not a measurement: {rows} rows of {length} tokens take"
        f" at least {least} for their operations; a program reads"
        f" {results['weight_bytes_a_loop'] / 2**20:.2f} MiB of weights from L2 each loop."
    )


def _check_loops(config: Config) -> None:
    if not isinstance(config.model, LoopedModel):
        raise InputError(f"--inference: {config.name} is {config.model.described}, it has no loops")


def _timed(config: Config, rows: int, loops: int, passes: int) -> dict[str, Any]:
    """Quartiles of the milliseconds of a pass by contender, taking turns."""
    programs, missing = {}, {}
    for name in (LAUNCHED, SCANNED, PLAIN):
        made = _program(config, name, rows, loops, passes)
        (missing if isinstance(made, str) else programs)[name] = made
    milliseconds = timing.quartiles(programs, ROUNDS, 1e3)
    return {
        "rows": rows,
        "length": LENGTH,
        "loops": loops,
        "operations": flops.operations_a_pass(config, rows, LENGTH, loops),
        "milliseconds": milliseconds,
        "missing": missing,
    }


def _program(config: Config, name: str, rows: int, loops: int, passes: int):
    """A `timing.Program` of passes that wait for one another; or why there is none."""
    on_gpu = jax.default_backend() == "gpu"
    if name == SCANNED and not on_gpu:
        return "needs a GPU: the CPU has no kernels to run"
    attention = "pallas" if name == SCANNED else None
    network = models.build(config, jax.random.key(0), attention)
    task = tasks.of(config.data)
    tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH), 0, len(task.vocabulary))
    if name == LAUNCHED and not network.supports_fused(tokens):
        return "no GPU that it is for" if not on_gpu else "no program holds such rows"
    definition, weights = nnx.split(network)

    @jax.jit
    def run(weights, tokens):
        def once(_, tokens):
            ids = task.position_ids(tokens)
            merged = nnx.merge(definition, weights)
            if name == LAUNCHED:
                logits = merged.fused_forward(tokens, loops=loops, position_ids=ids)[0]
            else:
                logits = merged(tokens, loops=loops, position_ids=ids)
            # Never true, which the compiler does not know.
            return tokens + (logits.max(-1) > 1e30)

        return jax.lax.fori_loop(0, passes, once, tokens)

    with targets.without_kernels() if name == PLAIN else contextlib.nullcontext():
        executable = run.lower(weights, tokens).compile()
    return timing.Program(lambda: jax.block_until_ready(executable(weights, tokens)), passes)

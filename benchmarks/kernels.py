"""Our attention against what one would otherwise call, on the GPU at hand:
`python -m benchmarks.kernels [--shape BxTxHxD ...] [--rounds N] [--json FILE]`.

bfloat16, causal. Ours turns q and k by RoPE; the others do not, and are spared that work. Peers
that are not installed, or cannot take a shape, are named with the reason. Measurements of other
shapes that FILE holds, from the same device and packages, stay.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import attention
from pallas_kernels.programs import Table, console, run_program
from pallas_kernels.tuning import timing
from pallas_kernels.tuning.shapes import LONG, TRAINING, Shape, parse_shape

# The quickstart's shape is no work for a GPU.
SHAPES = tuple(shape for shape in TRAINING + LONG if shape.head_dim >= 32)
DTYPE = jnp.bfloat16
# Best of a few blocks: JAX's example kernel has no table of its own.
EXAMPLE_BLOCKS = ((32, 32), (64, 64), (128, 64))
# On an H100 it compiled for a minute at 64 tokens, and was the slowest of all.
SHORTEST_FOR_MOSAIC = 512
WORKERS = 8
OURS = "ours, with RoPE"
EXAMPLE = "jax example"
TORCH = "torch sdpa"
# In the order of the tables; JAX's example stands once, with its best blocks.
CONTENDERS = (OURS, "xla", "cudnn", EXAMPLE, "tokamax triton", "tokamax mosaic", TORCH)


class Missing(Exception):
    """A contender that cannot take part, and why."""


class Speeds(NamedTuple):
    """What the GPU at hand reaches: bytes a second of a copy, operations a second of a product."""

    copy: float
    product: float

    def floor(self, shape: Shape, *, backward: bool) -> float:
        """Seconds that a call takes at least at these speeds."""
        item_size = jnp.dtype(DTYPE).itemsize
        return max(
            timing.bytes_moved(shape, item_size, backward=backward) / self.copy,
            timing.operations(shape, backward=backward) / self.product,
        )


def contenders() -> dict[str, Callable[[Shape], Callable]]:
    """By name, what makes a function of q, k, v for a shape; it raises `Missing` if it cannot."""
    made = {
        OURS: lambda shape: functools.partial(
            attention, positions=jnp.arange(shape.length), implementation="pallas"
        ),
        "xla": lambda _: _plain(implementation="xla"),
        "cudnn": lambda _: _plain(implementation="cudnn"),
    }
    for block_q, block_k in EXAMPLE_BLOCKS:
        made[f"{EXAMPLE} {block_q}x{block_k}"] = functools.partial(
            _jax_example, block_q=block_q, block_k=block_k
        )
    for implementation in ("triton", "mosaic"):
        made[f"tokamax {implementation}"] = functools.partial(
            _tokamax, implementation=implementation
        )
    return made


def _plain(implementation):
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )


def _jax_example(shape: Shape, block_q: int, block_k: int):
    module = _optional("jax.experimental.pallas.ops.gpu.attention", "jax")
    if shape.length % block_q or shape.length % block_k:
        raise Missing(f"length {shape.length} is no multiple of its blocks")
    blocks = module.BlockSizes(
        block_q=block_q,
        block_k=block_k,
        block_q_dkv=min(block_q, block_k),
        block_kv_dkv=min(block_q, block_k),
        block_q_dq=min(block_q, block_k),
        block_kv_dq=min(block_q, block_k),
    )
    scale = shape.head_dim**-0.5
    return lambda q, k, v: module.mha(
        q, k, v, segment_ids=None, sm_scale=scale, causal=True, block_sizes=blocks
    )


def _tokamax(shape: Shape, implementation: str):
    if implementation == "mosaic" and shape.length < SHORTEST_FOR_MOSAIC:
        raise Missing("compiles for more than a minute, and is slowest, on short rows")
    module = _optional("tokamax", "tokamax")
    return functools.partial(
        module.dot_product_attention, is_causal=True, implementation=implementation
    )


def _optional(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed ({error})") from None


def torch_program(shape: Shape, *, backward: bool, seconds_a_call: float) -> timing.Program:
    """PyTorch's scaled_dot_product_attention on the same amount of data, in a CUDA graph."""
    torch = _optional("torch", "torch")
    if not torch.cuda.is_available():
        raise Missing("torch sees no GPU")
    draw = lambda: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    calls = timing.call_count(shape, jnp.dtype(DTYPE).itemsize)
    q, d_out = draw(), draw()
    pairs = [(draw(), draw()) for _ in range(calls)]
    for tensor in [q, *(x for pair in pairs for x in pair)]:
        tensor.requires_grad_(backward)

    def every_call():
        x = q
        for k, v in pairs:
            heads_first = (tensor.transpose(1, 2) for tensor in (x, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
            out = out.transpose(1, 2)
            if backward:
                torch.autograd.grad(out, (x, k, v), d_out)
                out = out.detach().requires_grad_()
            x = out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            every_call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every_call()
    rounds = timing.round_count(calls, seconds_a_call)

    def run():
        for _ in range(rounds):
            graph.replay()
        torch.cuda.synchronize()

    return timing.Program(run, rounds * calls)


def measure(
    shape: Shape,
    speeds: Speeds,
    *,
    backward: bool,
    rounds: int,
    say: Callable[[str], None],
) -> dict:
    """Microseconds a call of every contender, and why the others are missing.

    Of JAX's example kernel the best blocks are kept.
    """
    floor = speeds.floor(shape, backward=backward)
    guess = 2 * floor + 3e-6
    given = timing.inputs(shape, DTYPE, timing.call_count(shape, jnp.dtype(DTYPE).itemsize))
    made = contenders()

    def ready(name: str) -> timing.Program | str:
        start = time.perf_counter()
        try:
            function = made[name](shape)
            step = (
                timing.gradient_step(function, given.d_out)
                if backward
                else timing.forward_step(function)
            )
            program = timing.program(step, given.q, given, seconds_a_call=guess)
        except Missing as reason:
            return str(reason)
        except Exception as error:
            return _limit(error)
        say(f"  {name}: ready in {time.perf_counter() - start:.1f} s")
        return program

    # XLA times its own candidates while it compiles: nothing runs beside it.
    outcomes = {name: ready(name) for name in made if name == "xla"}
    others = [name for name in made if name != "xla"]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        outcomes |= dict(zip(others, pool.map(ready, others), strict=True))
    for name, program in outcomes.items():
        if isinstance(program, timing.Program):
            # Alone: a first run may be captured as a CUDA graph, which work beside it would break.
            outcomes[name] = _run_once(program)
    programs = {n: p for n, p in outcomes.items() if isinstance(p, timing.Program)}
    missing = {n: reason for n, reason in outcomes.items() if isinstance(reason, str)}
    try:
        programs[TORCH] = torch_program(shape, backward=backward, seconds_a_call=guess)
    except Missing as reason:
        missing[TORCH] = str(reason)
    except Exception as error:
        missing[TORCH] = _limit(error)
    microseconds = timing.quartiles(programs, rounds, 1e6)
    examples = [name for name in microseconds if name.startswith(EXAMPLE)]
    for name in sorted(examples, key=lambda name: microseconds[name]["median"])[1:]:
        del microseconds[name]
    return {
        "shape": str(shape),
        "pass": "forward+backward" if backward else "forward",
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "copy_bytes_per_second": speeds.copy,
        "product_operations_per_second": speeds.product,
        "floor_microseconds": 1e6 * floor,
        "microseconds": microseconds,
        "missing": missing,
    }


def _run_once(program: timing.Program) -> timing.Program | str:
    try:
        program.run()
    except Exception as error:
        return _limit(error)
    return program


def _limit(error: Exception) -> str:
    """A peer's own limits, of many kinds: reported, not hidden."""
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def shown_times(entry: dict) -> dict[str, float]:
    """Median microseconds by contender, of one measurement of a results file."""
    # The example kernel's name carries its blocks.
    return {
        (EXAMPLE if name.startswith(EXAMPLE) else name): times["median"]
        for name, times in entry["microseconds"].items()
    }


def against_best_peer(times: dict[str, float]) -> str:
    """How many times as long as ours the fastest of the others takes; "-" where one is missing."""
    peers = [time for name, time in times.items() if name != OURS]
    return f"{min(peers) / times[OURS]:.2f}" if OURS in times and peers else "-"


def table(results: dict) -> Table:
    """The results as a table: a row a shape and pass, times in microseconds."""
    heads = ("batch x length x heads x head_dim", "pass", "floor", *CONTENDERS, "best peer / ours")
    drawn = Table(*heads)
    for entry in results["measurements"]:
        times = shown_times(entry)
        cells = (f"{times[name]:.1f}" if name in times else "-" for name in CONTENDERS)
        floor = f"{entry['floor_microseconds']:.1f}"
        drawn.add_row(entry["shape"], entry["pass"], floor, *cells, against_best_peer(times))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", help="BxTxHxD; repeatable")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: must be at least 2")
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU; JAX's backend here is {jax.default_backend()}")
    if arguments.json:
        try:
            # Said now, not after minutes of timing.
            arguments.json.open("a").close()
        except OSError as error:
            parser.error(f"--json {arguments.json}: cannot be written ({error.strerror})")
    # A peer warns of each shape that it has no tiles for.
    logging.getLogger("absl").setLevel(logging.ERROR)
    device = jax.devices()[0]
    results = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "packages": _versions(),
        "dtype": jnp.dtype(DTYPE).name,
        "measurements": [],
    }
    shapes = arguments.shape or SHAPES
    if arguments.json:
        try:
            results["measurements"] = kept_measurements(arguments.json, results, shapes)
        except ValueError as error:
            parser.error(f"--json {arguments.json}: {error}")
    speeds = Speeds(timing.copy_speed(), timing.product_speed(DTYPE))
    console.print(
        f"{device.device_kind}: copies {speeds.copy / 1e12:.2f} TB/s, "
        f"multiplies {speeds.product / 1e12:.0f} TFLOP/s"
    )
    for shape in shapes:
        for backward in (False, True):
            console.print(f"{shape} {'forward+backward' if backward else 'forward'}")
            results["measurements"].append(
                measure(
                    shape,
                    speeds,
                    backward=backward,
                    rounds=arguments.rounds,
                    say=console.print,
                )
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))


def kept_measurements(path: Path, results: dict, shapes: Iterable[Shape]) -> list[dict]:
    """The measurements of other shapes in a results file, which is empty or like `results`.

    Raises:
      ValueError: it is of another device or other packages, or no results file.
    """
    text = path.read_text()
    if not text:
        return []
    try:
        there = json.loads(text)
        differing = [key for key in results if there.get(key) != results[key]]
        measurements = there["measurements"]
        kept = [entry for entry in measurements if entry["shape"] not in map(str, shapes)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("holds something else; name another file") from None
    for key in differing:
        if key != "measurements":
            raise ValueError(
                f"holds measurements with {key} = {there.get(key)!r}, and this is"
                f" {results[key]!r}; name another file"
            )
    return kept


def _versions() -> dict[str, str]:
    installed = {}
    for package in ("jaxlib", "tokamax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


if __name__ == "__main__":
    # PyTorch shares the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run_program(main)

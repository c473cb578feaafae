"""Which tile `looped_block` gets on the GPU at hand, for `tune`: all that fit are timed."""

import concurrent.futures
import dataclasses
import datetime
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.tuning import looped_case, timing
from pallas_kernels.tuning.cases import LOOPED, Case
from pallas_kernels.tuning.looped_case import LOOPS
from pallas_kernels.tuning.shapes import Shape

# A training step's rows at 256, 128 and 64 channels, and half as many of twice the length.
SHAPES = (
    *(Shape(128, 64, 4, head_dim) for head_dim in (64, 32, 16)),
    *(Shape(64, 128, 4, head_dim) for head_dim in (32, 16)),
)
ROUNDS = 5
CALLS = 20
WORKERS = 14
# A state that takes more registers of a thread leaves too few for products: about a thousand bytes
# spilled, seen in the compiler's output.
MOST_STATE = 64


def candidates() -> list[Case]:
    """All that are tried: tiles of weights from 32 x 32 to 256 x 128 numbers."""
    return [
        Case(LOOPED, shape, backward=False, settings=_settings(*sizes))
        for shape in SHAPES
        for sizes in itertools.product((32, 64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3, 4))
        if _leaves_room(shape, *sizes)
    ]


def _leaves_room(shape: Shape, block_width: int, _, num_warps: int, __) -> bool:
    width = shape.heads * shape.head_dim
    return block_width <= width and shape.length * width <= MOST_STATE * 32 * num_warps


def _settings(block_width: int, block_hidden: int, num_warps: int, num_stages: int):
    return {
        "block_width": block_width,
        "block_hidden": block_hidden,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def fastest(target: str, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The table's lines for the GPU at hand: settings and evidence by key.

    Args:
      target: whose tiles the GPU takes.
      say: is called with a line on every candidate.
    """
    tried = candidates()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        ready = list(pool.map(lambda case: _ready(case, target), tried))
    lines = {}
    for shape in SHAPES:
        programs = {}
        for place, case in enumerate(tried):
            if case.shape == shape and isinstance(ready[place], str):
                say(f"{looped_case.key(case)}: {_shown(case)}: {ready[place]}")
            elif case.shape == shape:
                programs[place] = ready[place]
        times = timing.medians(programs, ROUNDS)
        for place in sorted(times, key=lambda place: times[place][1]):
            case, microseconds = tried[place], 1e6 * times[place][1]
            say(f"{looped_case.key(case)}: {_shown(case)}: {microseconds:.0f} us")
            evidence = (
                f"{microseconds:.0f} us for {LOOPS} loops at {shape} on"
                f" {jax.devices()[0].device_kind}, {datetime.date.today()}"
            )
            if looped_case.key(case) not in lines and _serves_ids(case, target):
                lines[looped_case.key(case)] = {**case.settings, "evidence": evidence}
    return lines


def _serves_ids(case: Case, target: str) -> bool:
    """Whether models with ids, which the line is for too, fit: they take more of the chip."""
    if case.shape.length > tiles.LONGEST_BIASED_ROW:
        return True
    return not isinstance(_ready(dataclasses.replace(case, rope=False, clip=1), target), str)


def _ready(case: Case, target: str) -> timing.Program | str:
    """A program that runs all loops again and again; or why there is none."""
    try:
        executable, given = _compiled(case, target)
    except Exception as error:  # A tile that does not fit is what the search is for.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"

    def run():
        jax.block_until_ready([executable(*given) for _ in range(CALLS)])

    return timing.Program(run, CALLS)


def _compiled(case: Case, target: str):
    """The program of a case, and arguments for it: random weights, and thresholds that no token
    reaches."""
    function, shapes = case.program(target)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def drawn(shape):
        if shape.dtype == jnp.int32:
            return jnp.ones(shape.shape, jnp.int32)
        return 0.1 * jax.random.normal(next(keys), shape.shape)

    *given, thresholds = jax.tree.map(drawn, shapes)
    given = (*given, jnp.full(thresholds.shape, 2.0))
    return jax.jit(function).lower(*given).compile(), given


def _shown(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.settings.items())

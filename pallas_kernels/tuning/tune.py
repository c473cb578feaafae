"""Finds tiles for the table that the kernels read: by time on a GPU at hand, or by the compiler."""

import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.ops.attention import attention, flash
from pallas_kernels.ops.attention.tile import AttentionInputs
from pallas_kernels.padding import padded
from pallas_kernels.programs import InputError
from pallas_kernels.targets import TARGETS
from pallas_kernels.tuning import aot, timing
from pallas_kernels.tuning.cases import ATTENTION, CLIP, DROPOUT, Case
from pallas_kernels.tuning.shapes import Shape

DTYPE = "bfloat16"
ITEM_SIZE = 2
FUSED_ROW_SHAPES = tuple(
    Shape(batch, length, 4, head_dim)
    for head_dim in (32, 64, 128)
    for batch, length in ((1024, 16), (1024, 24), (128, 64), (64, 128))
)
FLASH_SHAPES = tuple(Shape(4, 4096, 16, head_dim) for head_dim in (64, 128))
# Lengths at which whole calls are compared, at a constant number of tokens and channels.
AGAINST_CUDNN = (128, 256, 512, 1024, 4096)
CUDNN = "cudnn_from"
ROUNDS = 5
# A call that takes a few microseconds is repeated this often in one program at least; each copy of
# it costs seconds of compiling.
CALLS = 2
WORKERS = 14
# Where what is found lies unless it is written where it has an effect.
OUT = Path("runs") / "tuned"


class Candidate(NamedTuple):
    """One way to launch a kernel, and the shape and type that it is judged at."""

    kernel: str
    shape: Shape
    settings: dict[str, Any]
    dtype: str = DTYPE

    @property
    def key(self) -> str:
        """Of the table's line that it would fill."""
        item_size = jnp.dtype(self.dtype).itemsize
        return tiles.key(self.kernel, self.shape.length, self.shape.head_dim, item_size)

    def case(self) -> Case:
        """What the compiler is given: a plain call."""
        return Case(ATTENTION, self.shape, self.dtype, kernel=self.kernel, settings=self.settings)

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.kernel}, {self.key}: {settings}"


def candidates(kernels: Iterable[str]) -> list[Candidate]:
    """All that are tried for some kernels."""
    return [
        Candidate(kernel, shape, settings)
        for kernel in kernels
        for shape in (FUSED_ROW_SHAPES if kernel in tiles.FUSED_ROW_KERNELS else FLASH_SHAPES)
        for settings in _settings(kernel, shape)
    ]


def _settings(kernel: str, shape: Shape) -> Iterable[dict[str, Any]]:
    if kernel in tiles.FUSED_ROW_KERNELS:
        rows = padded(shape.length)
        for num_warps in (1, 2, 4, 8):
            if rows / 32 <= num_warps <= max(1, rows / 8):
                yield {"num_warps": num_warps}
    else:
        for held, streamed, num_warps, num_stages in itertools.product(
            (64, 128), (32, 64), (4, 8), (2, 3)
        ):
            # Fewer scores a warp leave it idle, more do not fit its registers.
            if 512 <= held * streamed // num_warps <= 2048:
                blocks = (streamed, held) if kernel == "flash_d_kv" else (held, streamed)
                yield flash.BlockSizes(*blocks, num_warps, num_stages)._asdict()


def time_all(tried: Sequence[Candidate], say: Callable[[str], None]) -> dict[int, float]:
    """Seconds a call on the GPU at hand, by the candidate's place; what fails is left out."""
    given = {(c.shape, c.dtype): timing.inputs(c.shape, c.dtype, CALLS) for c in tried}

    def ready(candidate: Candidate) -> timing.Program | str:
        inputs = given[candidate.shape, candidate.dtype]
        item_size = jnp.dtype(candidate.dtype).itemsize
        guess = timing.bytes_moved(candidate.shape, item_size, backward=False) / 1e12
        step, first = _step(candidate, inputs)
        try:
            return timing.program(step, first, inputs, seconds_a_call=guess)
        except Exception as error:  # A tile that does not fit is what the search is for.
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"

    seconds = {}
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        programs = dict(enumerate(pool.map(ready, tried)))
    for place, program in programs.items():
        if isinstance(program, str):
            say(f"{tried[place]}: {program}")
    groups = itertools.groupby(programs, key=lambda i: (tried[i].kernel, tried[i].key))
    for _, places in groups:
        # Those for one line of the table take turns.
        usable = {i: programs[i] for i in places if isinstance(programs[i], timing.Program)}
        for place, (_, median, _) in timing.medians(usable, ROUNDS).items():
            seconds[place] = median
            say(f"{tried[place]}: {1e6 * median:.2f} us")
    return seconds


def _step(candidate: Candidate, given: timing.Inputs) -> tuple[Callable, jax.Array]:
    """A call of one kernel alone and its first input, for `timing.program`."""
    function, (_, _, _, inputs, scalars, *_) = candidate.case().program("h100")
    # The time does not depend on these.
    inputs = AttentionInputs(*(x if x is None else jnp.ones(x.shape, x.dtype) for x in inputs))
    lse = delta = jnp.full(scalars.shape, 6.0, scalars.dtype)
    if candidate.kernel.endswith("forward"):
        return lambda q, k, v: function(q, k, v, inputs, lse, delta, given.d_out), given.q

    def backward(d_out, k, v):
        first, *others = function(given.q, k, v, inputs, lse, delta, d_out)
        return first, others

    return backward, given.d_out


def fastest(tried: Sequence[Candidate], seconds: dict[int, float], device: str) -> dict:
    """The table's lines for the GPU at hand: kernel, key, settings and evidence."""
    lines = {}
    for place in sorted(seconds, key=seconds.get):
        candidate = tried[place]
        evidence = f"{1e6 * seconds[place]:.1f} us at {candidate.shape} on {device}, {today()}"
        entry = {**candidate.settings, "evidence": evidence}
        lines.setdefault(candidate.kernel, {}).setdefault(candidate.key, entry)
    return lines


def cudnn_from(say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """From which length on cuDNN is faster, forward and backward with RoPE, by key of the head."""
    shapes = [Shape(2**14 // n, n, 16, head_dim) for head_dim in (64, 128) for n in AGAINST_CUDNN]
    given = {shape: timing.inputs(shape, DTYPE, CALLS) for shape in shapes}

    def ready(shape: Shape, name: str) -> timing.Program:
        positions = jnp.arange(shape.length)
        call = functools.partial(attention, positions=positions, implementation=name)
        step = timing.gradient_step(call, given[shape].d_out)
        guess = timing.bytes_moved(shape, ITEM_SIZE, backward=True) / 1e12
        return timing.program(step, given[shape].q, given[shape], seconds_a_call=guess)

    names = ("pallas", "cudnn")
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        programs = {s: {n: pool.submit(ready, s, n) for n in names} for s in shapes}
    lines = {}
    # From the longest down, as long as cuDNN is ahead.
    for shape in sorted(shapes, key=lambda shape: (shape.head_dim, -shape.length)):
        times = timing.medians({n: p.result() for n, p in programs[shape].items()}, ROUNDS)
        ours, cudnn = (1e6 * times[name][1] for name in names)
        say(f"{shape}, forward and backward: ours {ours:.1f} us, cuDNN {cudnn:.1f} us")
        key = tiles.head_key(shape.head_dim, ITEM_SIZE)
        if ours <= cudnn:
            lines.setdefault(key, None)
        elif lines.get(key, {}) is not None:
            device = jax.devices()[0].device_kind
            evidence = f"ours {ours:.0f} us, cuDNN {cudnn:.0f} us at {shape} on {device}, {today()}"
            lines[key] = {"length": shape.length, "evidence": evidence}
    return {key: line for key, line in lines.items() if line is not None}


def today() -> str:
    return datetime.date.today().isoformat()


def best_compiled(tried: Sequence[Candidate], target: str, say: Callable[[str], None]) -> dict:
    """The table's lines for a chip that is not there.

    A tile must do for everything that is asked of it, and is chosen by a plain call.
    """
    plain = [candidate.case() for candidate in tried]
    everything = [dataclasses.replace(case, rate=DROPOUT, clip=CLIP) for case in plain]
    reports = aot.measure([target], plain + everything)
    usable = []
    for candidate, report, most in zip(
        tried, reports[: len(tried)], reports[len(tried) :], strict=True
    ):
        problem = report.problem
        if (
            candidate.shape.length <= tiles.LONGEST_BIASED_ROW
            or report.kernel in tiles.FLASH_KERNELS
        ):
            problem = problem or most.problem
        say(
            f"{target}: {candidate}: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared{', ' + problem if problem else ''}"
        )
        if problem is None:
            usable.append(report)
    return preferred(usable)


def preferred(usable: Iterable[aot.Report]) -> dict:
    """The table's lines by what the compiler says: kernel, key, settings and evidence."""
    lines = {}
    for report in sorted(usable, key=_preference):
        case = report.case
        key = Candidate(case.kernel, case.shape, {}, case.dtype).key
        evidence = (
            f"compiled: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared, {today()}"
        )
        entry = {**case.settings, "evidence": evidence}
        lines.setdefault(case.kernel, {}).setdefault(key, entry)
    return lines


def whole_rows(kernels: dict) -> dict:
    """A target's table where a row is held whole forward and backward, or not at all."""
    whole = kernels["fused_row_forward"].keys() & kernels["fused_row_backward"].keys()
    return kernels | {
        kernel: {key: entry for key, entry in kernels[kernel].items() if key in whole}
        for kernel in tiles.FUSED_ROW_KERNELS
    }


def _preference(report: aot.Report) -> tuple:
    """Smaller is better: spills, then small tiles, then fewer or more warps than 16 rows each."""
    settings = report.case.settings
    rows = settings.get("block_q") or padded(report.case.shape.length)
    return (
        report.spilled,
        -rows * settings.get("block_k", 1),
        abs(settings["num_warps"] - rows / 16),
        -settings.get("num_stages", 0),
    )


def kept_lines(kernels: dict, kernel: str, tried: Sequence[Candidate]) -> dict:
    """Old lines of a kernel that stay unless there is a new one for their key."""
    if kernel == CUDNN:
        return {}
    if kernel in (*tiles.FLASH_KERNELS, tiles.LOOPED):
        return kernels[kernel]
    # A whole row of which no candidate is left is to be streamed.
    keys = {candidate.key for candidate in tried}
    return {key: entry for key, entry in kernels[kernel].items() if key not in keys}


def table_so_far(path: Path) -> dict:
    """The table at a path, in a folder that is made, or the kernels' own where there is none.

    Raises:
      InputError: what is there is no table of tiles, or cannot be read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = dict(tiles.read(path)) if path.exists() else dict(tiles.table())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use {path} ({error})") from None
    if not table.keys() >= TARGETS.keys():
        raise InputError(f"{path} is there, and is no table of tiles")
    return table


def write_table(table: dict, path: Path, say: Callable[[str], None]) -> None:
    """Raises `InputError` where it cannot be written."""
    try:
        path.write_text(tiles.as_text(table))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    unread = "" if path == tiles.FILE else "; the kernels read their own, which --write changes"
    say(f"wrote {path}{unread}")

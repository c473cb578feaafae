"""Finds tiles, for the table that the kernels read:
`python -m pallas_kernels.tune [--target NAME,...] [--kernel NAME ... | --spec SPEC] [--write]`

Without `--target`, the candidates are timed on the GPU at hand: bfloat16, causal, with RoPE,
without dropout, one shape for each key of the table; `--kernel cudnn_from` compares whole calls
with cuDNN, for the length from which on that is faster, `--kernel looped_block` times all loops of
a block. With `--target`, for chips that are not there, the compiler is asked instead: of the
candidates that spill least, the one with the largest tile. Whole rows whose kernels all spill
heavily are left to the streaming ones; `looped_block` is not asked about. Lines for other targets
stay as they are.

With `--spec`, the candidates are those that a specification declares (`design_space`), at its own
shape; what breaks one of its laws is left out. What was found is a fact of it, with a file of
evidence.

What comes of it lies in `runs/tuned`, or the folder that `--out` names: a table, the kernels' with
the new lines or the one that is there, and evidence. With `--write` it goes where it has an effect:
into the kernels' own table, `figures/results` and the specification.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import (
    attention,
    compile,
    design_space,
    long,
    looped_tune,
    short,
    tiles,
    timing,
)
from pallas_kernels.design_space import Declared
from pallas_kernels.laws import LawError
from pallas_kernels.programs import console, run_program
from pallas_kernels.shapes import Shape
from pallas_kernels.specification_files import specification_file
from pallas_kernels.targets import TARGETS, target_at_hand
from pallas_kernels.tile import Extras

DTYPE = "bfloat16"
ITEM_SIZE = 2
SHORT_SHAPES = tuple(
    Shape(batch, length, 4, head_dim)
    for head_dim in (32, 64, 128)
    for batch, length in ((1024, 16), (1024, 24), (128, 64), (64, 128))
)
LONG_SHAPES = tuple(Shape(4, 4096, 16, head_dim) for head_dim in (64, 128))
# Lengths at which whole calls are compared, at a constant number of tokens and channels.
AGAINST_CUDNN = (128, 256, 512, 1024, 4096)
CUDNN = "cudnn_from"
ROUNDS = 5
# A call that takes a few microseconds is repeated this often in one program at least; each copy of
# it costs seconds of compiling.
CALLS = 2
WORKERS = 14
OUT = Path("runs") / "tuned"
# Where the files lie that the facts of specifications rest on.
EVIDENCE = Path("figures") / "results"


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

    def case(self) -> compile.Case:
        """What the compiler is given: a plain call."""
        return compile.Case(self.shape, self.dtype, kernel=self.kernel, settings=self.settings)

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.kernel}, {self.key}: {settings}"


def candidates(kernels: Iterable[str]) -> list[Candidate]:
    """All that are tried for some kernels."""
    return [
        Candidate(kernel, shape, settings)
        for kernel in kernels
        for shape in (SHORT_SHAPES if kernel in tiles.SHORT_KERNELS else LONG_SHAPES)
        for settings in _settings(kernel, shape)
    ]


def _settings(kernel: str, shape: Shape) -> Iterable[dict[str, Any]]:
    if kernel in tiles.SHORT_KERNELS:
        rows = short.rows_held(shape.length)
        for num_warps in (1, 2, 4, 8):
            if rows / 32 <= num_warps <= max(1, rows / 8):
                yield {"num_warps": num_warps}
    else:
        for held, streamed, num_warps, num_stages in itertools.product(
            (64, 128), (32, 64), (4, 8), (2, 3)
        ):
            # Fewer scores a warp leave it idle, more do not fit its registers.
            if 512 <= held * streamed // num_warps <= 2048:
                blocks = (streamed, held) if kernel == "long_d_kv" else (held, streamed)
                yield long.Tile(*blocks, num_warps, num_stages)._asdict()


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
    function, (_, _, _, extras, scalars, *_) = compile.program(candidate.case(), "h100")
    # The time does not depend on these.
    extras = Extras(*(x if x is None else jnp.ones(x.shape, x.dtype) for x in extras))
    lse = delta = jnp.full(scalars.shape, 6.0, scalars.dtype)
    if candidate.kernel.endswith("forward"):
        return lambda q, k, v: function(q, k, v, extras, lse, delta, given.d_out), given.q

    def backward(d_out, k, v):
        first, *others = function(given.q, k, v, extras, lse, delta, d_out)
        return first, others

    return backward, given.d_out


def fastest(tried: Sequence[Candidate], seconds: dict[int, float], device: str) -> dict:
    """The table's lines for the GPU at hand: kernel, key, settings and evidence."""
    lines = {}
    for place in sorted(seconds, key=seconds.get):
        candidate = tried[place]
        evidence = f"{1e6 * seconds[place]:.1f} us at {candidate.shape} on {device}, {_today()}"
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
            evidence = (
                f"ours {ours:.0f} us, cuDNN {cudnn:.0f} us at {shape} on {device}, {_today()}"
            )
            lines[key] = {"length": shape.length, "evidence": evidence}
    return {key: line for key, line in lines.items() if line is not None}


def _today() -> str:
    return datetime.date.today().isoformat()


def best_compiled(tried: Sequence[Candidate], target: str, say: Callable[[str], None]) -> dict:
    """The table's lines for a chip that is not there.

    A tile must do for everything that is asked of it, and is chosen by a plain call.
    """
    plain = [candidate.case() for candidate in tried]
    everything = [
        dataclasses.replace(case, rate=compile.DROPOUT, clip=compile.CLIP) for case in plain
    ]
    reports = compile.measure([target], plain + everything)
    usable = []
    for candidate, report, most in zip(
        tried, reports[: len(tried)], reports[len(tried) :], strict=True
    ):
        problem = report.problem
        if (
            candidate.shape.length <= tiles.LONGEST_BIASED_ROW
            or report.kernel in tiles.LONG_KERNELS
        ):
            problem = problem or most.problem
        say(
            f"{target}: {candidate}: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared{', ' + problem if problem else ''}"
        )
        if problem is None:
            usable.append(report)
    return _preferred(usable)


def _preferred(usable: Iterable[compile.Report]) -> dict:
    """The table's lines by what the compiler says: kernel, key, settings and evidence."""
    lines = {}
    for report in sorted(usable, key=_preference):
        case = report.case
        key = Candidate(case.kernel, case.shape, {}, case.dtype).key
        evidence = (
            f"compiled: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared, {_today()}"
        )
        entry = {**case.settings, "evidence": evidence}
        lines.setdefault(case.kernel, {}).setdefault(key, entry)
    return lines


class Found(NamedTuple):
    """What came of tuning by a specification on one target.

    lines: of the table, by kernel and key. tried: for the file of evidence, every candidate.
    chosen: by kernel, the candidate taken.
    """

    lines: dict[str, dict[str, dict[str, Any]]]
    tried: list[dict[str, Any]]
    chosen: dict[str, dict[str, Any]]


def within_laws(
    declared: Declared, target: str, say: Callable[[str], None], *, timed: bool
) -> Found:
    """The best of the tiles that a specification declares for a target and its laws allow.

    Args:
      declared: what it declares.
      target: a name in `TARGETS`.
      say: is told of every candidate.
      timed: whether the target's GPU is at hand, so that times decide; else the compiler does.

    Raises:
      LawError: it declares nothing for the target, or no tile of a kernel obeys the laws.
    """
    spaces = {
        k: by_target[target] for k, by_target in declared.spaces.items() if target in by_target
    }
    if not spaces:
        raise LawError(f"declares no design space for {target}: [kernels.KERNEL.{target}]")
    tried = [
        Candidate(kernel, declared.case.shape, settings, declared.case.dtype)
        for kernel, space in spaces.items()
        for settings in design_space.tiles_in(kernel, space)
    ]
    cases = [
        dataclasses.replace(declared.case, kernel=c.kernel, settings=c.settings) for c in tried
    ]
    reports = compile.measure([target], cases)
    broken = [design_space.broken_laws(declared, target, [report]) for report in reports]
    lawful = [i for i in range(len(tried)) if not broken[i] and not reports[i].problem]
    for kernel in spaces:
        if not any(tried[i].kernel == kernel for i in lawful):
            names = sorted(
                {name for i, c in enumerate(tried) if c.kernel == kernel for name in broken[i]}
            )
            raise LawError(f"no tile of kernels.{kernel}.{target} obeys {', '.join(names) or 'it'}")
    seconds = {}
    if timed:
        allowed = [tried[i] for i in lawful]
        seconds = {lawful[i]: s for i, s in time_all(allowed, say).items()}
        lines = fastest(tried, seconds, jax.devices()[0].device_kind)
    else:
        lines = _preferred(reports[i] for i in lawful)
    told = []
    for i, (candidate, report) in enumerate(zip(tried, reports, strict=True)):
        breaks = f", breaks {', '.join(broken[i])}" if broken[i] else ""
        say(
            f"{target}: {candidate}: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared{breaks}"
        )
        told.append(
            {
                "kernel": candidate.kernel,
                "settings": candidate.settings,
                "registers": report.registers,
                "spilled": report.spilled,
                "shared_memory": report.shared_memory,
                "problem": report.problem,
                "broken": broken[i],
                "microseconds": 1e6 * seconds[i] if i in seconds else None,
            }
        )
    taken = {k: _settings_alone(entry) for k, by_key in lines.items() for entry in by_key.values()}
    chosen = {one["kernel"]: one for one in told if one["settings"] == taken.get(one["kernel"])}
    return Found(lines, told, chosen)


def _settings_alone(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "evidence"}


def record(declared: Declared, target: str, found: Found, evidence: Path) -> tuple[str, str]:
    """Writes a file of evidence.

    Returns:
      What rests on it: a claim, and the expression that holds of the evidence by the name `tuned`.
    """
    limit = TARGETS[target].shared_memory
    content = {
        "specification": declared.name,
        "target": target,
        "shape": str(declared.case.shape),
        "dtype": declared.case.dtype,
        "date": _today(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "shared_memory_per_block": limit,
        "laws": {name: law.text for name, law in declared.laws.items()},
        "chosen": found.chosen,
        "tried": found.tried,
    }
    evidence.parent.mkdir(parents=True, exist_ok=True)
    evidence.write_text(json.dumps(content, indent=1) + "\n")
    lawful = sum(not one["broken"] and not one["problem"] for one in found.tried)
    tiles_taken = "; ".join(
        f"{kernel} {' '.join(f'{k}={v}' for k, v in one['settings'].items())}"
        for kernel, one in found.chosen.items()
    )
    how = "by time" if any(one["microseconds"] for one in found.tried) else "by the compiler"
    claim = (
        f"Of {len(found.tried)} tiles declared for {target}, {lawful} obey the laws; chosen {how}:"
        f" {tiles_taken}."
    )
    holds = " and ".join(
        f"tuned.chosen.{kernel}.shared_memory <= tuned.shared_memory_per_block and"
        f" tuned.chosen.{kernel}.spilled <= {one['spilled']}"
        for kernel, one in found.chosen.items()
    )
    return claim, holds


def _whole_rows(kernels: dict) -> dict:
    """A target's table where a row is held whole forward and backward, or not at all."""
    whole = kernels["short_forward"].keys() & kernels["short_backward"].keys()
    return kernels | {
        kernel: {key: entry for key, entry in kernels[kernel].items() if key in whole}
        for kernel in tiles.SHORT_KERNELS
    }


def _preference(report: compile.Report) -> tuple:
    """Smaller is better: spills, then small tiles, then fewer or more warps than 16 rows each."""
    settings = report.case.settings
    rows = settings.get("block_q") or short.rows_held(report.case.shape.length)
    return (
        report.spilled,
        -rows * settings.get("block_k", 1),
        abs(settings["num_warps"] - rows / 16),
        -settings.get("num_stages", 0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument(
        "--target",
        type=compile.parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"ask the compiler, for some of {', '.join(TARGETS)}; no GPU needed",
    )
    parser.add_argument(
        "--kernel",
        choices=(choices := (*tiles.KERNELS, tiles.LOOPED, CUDNN)),
        action="append",
        metavar="NAME",
        help=f"of {', '.join(choices)}; repeatable (default: all but the last two; {CUDNN} uses"
        " the table as it is)",
    )
    parser.add_argument(
        "--spec", type=Path, help="choose from what this specification declares, within its laws"
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--out", type=Path, metavar="DIR", default=OUT, help="what is found (default: %(default)s)"
    )
    places.add_argument(
        "--write",
        action="store_true",
        help="into the kernels' own table; with --spec also the evidence into figures/results and"
        " a fact into the specification",
    )
    arguments = parser.parse_args()
    if arguments.spec and arguments.kernel:
        parser.error("--kernel: the specification says which kernels")
    names = arguments.target
    if not names and jax.default_backend() != "gpu":
        parser.error(f"needs a GPU or --target; JAX's backend here is {jax.default_backend()}")
    if arguments.spec:
        _tune_by(specification_file(arguments.spec), names, arguments, parser, console.print)
        return
    path = _table_path(arguments)
    table = _table_so_far(path, parser)
    kernels = arguments.kernel or tiles.KERNELS
    if names and tiles.LOOPED in kernels:
        parser.error(f"--kernel {tiles.LOOPED}: is timed on the GPU at hand, without --target")
    tried = candidates(kernel for kernel in kernels if kernel in tiles.KERNELS)
    found = {}
    if names:
        for name in names:
            console.print(f"{name}: compiling {len(tried)} candidates, plain and with everything")
            try:
                found[name] = best_compiled(tried, name, console.print)
            except compile.Unavailable as error:
                parser.error(str(error))
    else:
        device = jax.devices()[0].device_kind
        console.print(f"{device}: compiling {len(tried)} candidates")
        lines = fastest(tried, time_all(tried, console.print), device)
        if CUDNN in kernels:
            lines[CUDNN] = cudnn_from(console.print)
        if tiles.LOOPED in kernels:
            lines[tiles.LOOPED] = looped_tune.fastest(target_at_hand(), console.print)
        found[target_at_hand()] = lines
    for target, lines in found.items():
        kept = {kernel: _kept(table[target], kernel, tried) for kernel in lines}
        new = {kernel: kept[kernel] | entries for kernel, entries in lines.items()}
        table[target] = _whole_rows(table[target] | new)
    _write_table(table, path, parser, console.print)


def _table_path(arguments: argparse.Namespace) -> Path:
    return tiles.FILE if arguments.write else arguments.out / tiles.FILE.name


def _table_so_far(path: Path, parser: argparse.ArgumentParser) -> dict:
    """The table at a path, in a folder that is made, or the kernels' own where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = dict(tiles.read(path)) if path.exists() else dict(tiles.table())
    except (OSError, ValueError) as error:
        parser.error(f"cannot use {path} ({error})")
    if not table.keys() >= TARGETS.keys():
        parser.error(f"{path} is there, and is no table of tiles")
    return table


def _write_table(
    table: dict, path: Path, parser: argparse.ArgumentParser, say: Callable[[str], None]
) -> None:
    try:
        path.write_text(tiles.as_text(table))
    except OSError as error:
        parser.error(f"{path}: cannot be written ({error.strerror})")
    unread = "" if path == tiles.FILE else "; the kernels read their own, which --write changes"
    say(f"wrote {path}{unread}")


def _tune_by(
    path: Path,
    targets: Sequence[str],
    arguments: argparse.Namespace,
    parser: argparse.ArgumentParser,
    say: Callable[[str], None],
) -> None:
    """Tunes what a specification declares, on each target or on the GPU at hand."""
    table_path = _table_path(arguments)
    folder = EVIDENCE if arguments.write else arguments.out
    table = _table_so_far(table_path, parser)
    try:
        declared = design_space.read(path)
        for target in targets or (target_at_hand(),):
            found = within_laws(declared, target, say, timed=not targets)
            for kernel, lines in found.lines.items():
                old = table[target].get(kernel, {})
                table[target] = table[target] | {kernel: old | lines}
            _write_table(table, table_path, parser, say)
            evidence = folder / f"tuned_{declared.name}_{target}.json"
            claim, holds = record(declared, target, found, evidence)
            say(f"wrote {evidence}: {claim}")
            if arguments.write:
                files = {"tuned": os.path.relpath(evidence, path.parent)}
                text = path.read_text(encoding="utf-8")
                path.write_text(
                    design_space.with_fact(text, f"tuned-{target}", claim, files, holds)
                )
                say(f"wrote it into {path} as a fact")
    except (LawError, OSError, compile.Unavailable) as error:
        parser.error(f"--spec {path}: {error}")


def _kept(kernels: dict, kernel: str, tried: Sequence[Candidate]) -> dict:
    """Old lines of a kernel that stay unless there is a new one for their key."""
    if kernel == CUDNN:
        return {}
    if kernel in (*tiles.LONG_KERNELS, tiles.LOOPED):
        return kernels[kernel]
    # A whole row of which no candidate is left is to be streamed.
    keys = {candidate.key for candidate in tried}
    return {key: entry for key, entry in kernels[kernel].items() if key not in keys}


if __name__ == "__main__":
    run_program(main)

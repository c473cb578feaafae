"""Results of `benchmarks.kernels` and `pallas_kernels.compile` in Markdown:
`python -m benchmarks.report FILE ... [--shape BxTxHxD ...]`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import CONTENDERS, OURS, against_best_peer, shown_times
from pallas_kernels.kernel_names import current_name
from pallas_kernels.programs import run_program
from pallas_kernels.tuning.shapes import Shape, StreamShape, parse_shape


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--shape", type=_parse_any_shape, action="append", help="these rows only; repeatable"
    )
    arguments = parser.parse_args()
    for path in arguments.files:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            print(markdown(results, arguments.shape))
        except OSError as error:
            parser.error(f"{path}: cannot be read ({error.strerror})")
        except (ValueError, KeyError, TypeError, AttributeError, argparse.ArgumentTypeError):
            parser.error(f"{path}: no results of benchmarks.kernels or pallas_kernels.compile")


def _parse_any_shape(text: str) -> Shape | StreamShape:
    if text.count("x") == 1 and all(part.isdecimal() for part in text.split("x")):
        return StreamShape(*map(int, text.split("x")))
    return parse_shape(text)


def markdown(results: dict[str, Any], shapes: Sequence[Shape | StreamShape] | None = None) -> str:
    """The table of one file, of some shapes or of all.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: it is of neither program.
    """
    key, table = ("measurements", _bench) if "measurements" in results else ("kernels", _compile)
    names = None if shapes is None else set(map(str, shapes))
    wanted = [x for x in results[key] if names is None or x["shape"] in names]
    return table(results | {key: wanted})


def _bench(results: dict[str, Any]) -> str:
    entries = results["measurements"]
    names = [name for name in CONTENDERS if any(name in shown_times(entry) for entry in entries)]
    rows = []
    for entry in entries:
        times = shown_times(entry)
        floor = entry["floor_microseconds"]
        cells = [f"{times[name]:.1f}" if name in times else "-" for name in names]
        rows.append(
            [entry["shape"], entry["pass"], f"{floor:.1f}", *cells, against_best_peer(times)]
            + [f"{100 * floor / times[OURS]:.0f}%"]
        )
    heads = ["batch x length x heads x head_dim", "pass", "floor", *names]
    heads += ["best peer / ours", "floor / ours"]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    return (
        _table(heads, rows, left=2)
        + f"\n\nMicroseconds a call, medians of {_range(entries, 'rounds')} rounds,"
        f" {results['dtype']}, causal; {results['device']}, {_range(entries, 'date')}, JAX"
        f" {results['jax']}, {packages}. The floor: the bytes of a call at this GPU's own speed of"
        f" copying ({_range(entries, 'copy_bytes_per_second', 1e12, '.2f')} TB/s), or its"
        " operations at that of an 8192-wide product"
        f" ({_range(entries, 'product_operations_per_second', 1e12, '.0f')} TFLOP/s).\n"
    )


def _range(entries: Sequence[dict], key: str, unit: float | None = None, digits: str = "") -> str:
    """The values that measurements have, "least to most" where they differ."""
    values = sorted(entry[key] for entry in entries)
    ends = [format(value / unit if unit else value, digits) for value in (values[0], values[-1])]
    return " to ".join(dict.fromkeys(ends))


def _compile(results: dict[str, Any]) -> str:
    rows = [
        [
            kernel["target"],
            current_name(kernel["kernel"]),
            kernel["shape"],
            kernel["extras"],
            str(kernel["registers"]),
            str(kernel["spilled_bytes"]),
            f"{kernel['shared_memory_bytes']} of {kernel['shared_memory_limit_bytes']}",
            ", ".join(f"{n} {name}" for name, n in kernel["tensor_core_instructions"].items()),
            "ok" if kernel["ok"] else kernel["problem"],
        ]
        for kernel in results["kernels"]
    ]
    heads = ["target", "kernel", "shape", "with", "registers", "spilled B", "shared B"]
    heads += ["tensor cores", ""]
    return (
        _table(heads, rows, left=4)
        + f"\n\nCompiled without a GPU, {results['date']}, JAX {results['jax']}: registers of a"
        " thread, bytes it spills, shared memory of a block.\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Markdown; the first `left` columns are words, the others numbers."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_program(main)

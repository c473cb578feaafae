"""Results of timing the kernels and of `compile` in Markdown:
`python -m pallas_kernels.report FILE ... [--shape BxTxHxD ...]`.
"""

import argparse
import json
from pathlib import Path

from pallas_kernels.programs import run_program
from pallas_kernels.tuning.report import markdown
from pallas_kernels.tuning.shapes import Shape, StreamShape, parse_shape


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.report", description=__doc__)
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
            parser.error(f"{path}: no results of timing or compiling kernels")


def _parse_any_shape(text: str) -> Shape | StreamShape:
    if text.count("x") == 1 and all(part.isdecimal() for part in text.split("x")):
        return StreamShape(*map(int, text.split("x")))
    return parse_shape(text)


if __name__ == "__main__":
    run_program(main)

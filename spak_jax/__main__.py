"""The console command `spak`, also `python -m spak_jax`: `spak COMMAND ...`."""

import runpy
import sys

# Each is the program `python -m spak_jax.COMMAND`.
COMMANDS = {
    "train": "train a model, or go on with a training, and score it",
    "evaluate": "score a run on problems it has not seen",
    "grid": "score a run over lengths and loops, and draw how far it reaches",
    "solve": "let a trained model answer problems",
    "trace": "draw how a looped model comes to an answer",
    "halting": "measure what stopping each token early costs and saves",
    "figures": "draw figures and write tables from results files",
    "reproduce": "train, score and draw every system of a study",
    "convert": "import a checkpoint of the original PyTorch system",
    "release": "keep what others need of a run",
    "check": "hold specifications to what they claim",
    "tune": "choose kernel tiles by what a specification declares",
    "brief": "write a specification as one page",
}


def main() -> None:
    """Runs the program that the first word of the command line names."""
    words = sys.argv[1:]
    if words[:1] in ([], ["--help"], ["-h"]):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    command, *rest = words
    if command not in COMMANDS:
        print(f"error: spak {command}: must be of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"spak {command}", *rest]
    # As a program, not as a module that is imported: `spak_jax.train` stays the function.
    runpy.run_module(f"spak_jax.{command}", run_name="__main__", alter_sys=True)


def _usage() -> str:
    lines = [f"  {name:<10} {description}" for name, description in COMMANDS.items()]
    more = "`spak COMMAND --help` tells more of each."
    return "\n".join(["usage: spak COMMAND ...", "", *lines, "", more])


if __name__ == "__main__":
    main()

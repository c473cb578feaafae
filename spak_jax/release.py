"""What is left of a run for others: `python -m spak_jax.release RUN DIR`.

The weights of the newest checkpoint with their configuration, and the scores that ended the
training; not the optimizer's state, which is twice as large and only of use to go on training.
`evaluate`, `solve` and `trace` take the result as they take any run folder.
"""

import argparse
from pathlib import Path

from spak_jax.command_line import InputError, console, run_program, write_file
from spak_jax.training import checkpoint, run_folder


def release(run: Path, out: Path) -> int:
    """Writes a run folder that holds the newest weights of another, and nothing to go on from.

    Args:
      run: the run folder.
      out: the folder to make; it must not exist.

    Returns:
      The step of the weights.

    Raises:
      InputError: the run cannot be read, or `out` exists or cannot be written.
    """
    restored = checkpoint.restore(run)
    if out.exists():
        raise InputError(f"{out} exists: name a folder that does not")
    with run_folder.locked(out):
        released = checkpoint.Run(out)
        released.save(restored.step, restored.config, restored.weights)
        released.close()
        results = run / run_folder.RESULTS
        if results.is_file():
            write_file(out / run_folder.RESULTS, results.read_bytes())
    return restored.step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.release", description="Keep what others need of a run."
    )
    folder = run_folder.run_folder
    parser.add_argument("run", type=folder, metavar="RUN", help="a run folder")
    parser.add_argument("out", type=folder, metavar="DIR", help="the folder to make")
    arguments = parser.parse_args()
    step = release(arguments.run, arguments.out)
    console.print(f"{arguments.out}: the weights of step {step:,}")


if __name__ == "__main__":
    run_program(main)

"""Imports the original PyTorch system's weights: `python -m spak_jax.convert CHECKPOINT RUN`."""

import argparse
import re
from pathlib import Path

from spak_jax import models
from spak_jax.command_line import InputError, console, progress, run_program
from spak_jax.interop.torch_checkpoint import describe, read_original, translate
from spak_jax.training import checkpoint, run_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.convert",
        description="Import a checkpoint of the original PyTorch system into a run folder.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as ckpt.pt")
    parser.add_argument(
        "run", type=run_folder.run_folder, metavar="RUN", help="the run folder to make"
    )
    parser.add_argument(
        "--inject-input",
        action="store_true",
        help="the LoopLM was trained with its input injected into every loop; needed where the"
        " checkpoint does not say so itself (an inject_x0 in its config), for nothing else in"
        " the file shows it and the model would be another one without it",
    )
    parser.add_argument("--name", help="of the configuration (default: the run folder's name)")
    arguments = parser.parse_args()
    if run_folder.steps_in(arguments.run):
        raise InputError(f"{arguments.run} already holds checkpoints: name another folder")
    with progress(f"reading {arguments.checkpoint}"):
        original = read_original(arguments.checkpoint)
    name = _name_of(arguments.run) if arguments.name is None else arguments.name
    config = describe(original, name, arguments.inject_input)
    weights = translate(original, config)
    with run_folder.locked(arguments.run):
        run = checkpoint.Run(arguments.run)
        run.save(original.step, config, weights)
        run.close()
    console.print(
        f"{config.system}: {models.parameter_count(weights):,} parameters, step"
        f" {original.step:,}, now in {arguments.run}"
    )


def _name_of(run: Path) -> str:
    """The run folder's name with what a configuration's name may not hold replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run.resolve().name).lstrip("._-")
    return name[:100] or "imported"


if __name__ == "__main__":
    run_program(main)

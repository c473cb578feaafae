"""Programs that are tried in odd surroundings: what each is given, and what is read back of what it
made."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reliability.faults import Broken
from spak_jax.evaluation.results import read_results
from spak_jax.training import checkpoint, run_folder
from spak_jax.training.named_arrays import digest

# A file system's longest name, in bytes.
LONGEST = 255

# Learns nothing; four steps, two checkpoints, an invariant that holds.
CONFIG = """
name = "tiny"
[system]
name = "Tiny loop"
[model]
kind = "loop"
width = 16
heads = 2
loops = 2
[data]
layout = "single"
row_length = 24
examples = 900
[train]
steps = 4
batch = 8
warmup_steps = 2
decay_steps = 4
steps_per_call = 2
checkpoint_every = 2
[evaluation]
lengths = [1, 2]
examples = 5
[[invariant]]
name = "small"
law = "It is small."
check = "model.width < 17"
"""
DRAWN = ("generalization.png", "training.pdf", "table.md")
TRACED = ("trace.json", "trace.png", "trace.pdf")
# What is read back of a results file.
SCORES = ("lengths", "published_columns", "measures", "step", "seed")


class Files(NamedTuple):
    """What a trial's program is given and may write; all lie in `root`, nothing else does."""

    root: Path
    name: str

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        return self.root / "temporary"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def config(self) -> Path:
        return self._with_ending(self.folder, ".toml")

    @property
    def trained(self) -> Path:
        return self.folder / self.folder.name

    @property
    def original(self) -> Path:
        return self._with_ending(self.folder, ".pt")

    @property
    def new(self) -> Path:
        """Where the program writes, in a folder that is not there."""
        return self.folder / "new" / self.folder.name

    @property
    def new_json(self) -> Path:
        return self._with_ending(self.folder / "new", ".json")

    def _with_ending(self, folder: Path, ending: str) -> Path:
        stem = os.fsencode(self.folder.name)[: LONGEST - len(ending)]
        return folder / (os.fsdecode(stem) + ending)


class Program(NamedTuple):
    """words: its module and what it is given. read: what it made, or raises what keeps it from it.

    What is made is a list for comparisons, last the numbers that may differ in their last bits.
    """

    words: Callable[[Files], list[str | Path]]
    read: Callable[[Files, str], Any]


def _trained(files: Files, said: str) -> Any:
    restored = checkpoint.restore(files.new, optimizer=True)
    kept = json.loads((files.new / run_folder.RESULTS).read_bytes())
    read_results(files.new / run_folder.RESULTS)
    digests = [digest(each) for each in (restored.weights, restored.optimizer)]
    return [restored.step, {key: kept[key] for key in SCORES}, digests]


def _evaluated(files: Files, said: str) -> Any:
    read_results(files.new_json)
    kept = json.loads(files.new_json.read_bytes())
    return [{key: kept[key] for key in SCORES}, None]


def _written(names: Sequence[str], files: Files, said: str) -> Any:
    for name in names:
        if not (files.new / name).stat().st_size:
            raise Broken(f"{name} is empty")
    return [sorted(os.listdir(files.new)), None]


def _converted(files: Files, said: str) -> Any:
    restored = checkpoint.restore(files.new)
    return [restored.step, digest(restored.weights)]


def _says(words: Sequence[str], files: Files, said: str) -> Any:
    """What is said, but for how it is laid out; where nothing can be, `said` is None."""
    missing = [word for word in words if said is not None and word not in said]
    if missing:
        raise Broken(f"it does not say {missing[0]!r}: {said}")
    return [None, None]


PROGRAMS = {
    "train": Program(lambda files: ["spak_jax.train", files.config, "--run", files.new], _trained),
    "evaluate": Program(
        lambda files: ["spak_jax.evaluate", files.trained, "--json", files.new_json], _evaluated
    ),
    "solve": Program(
        lambda files: ["spak_jax.solve", files.trained, "1+2", "34+5"],
        functools.partial(_says, ("1+2", "34+5")),
    ),
    "trace": Program(
        lambda files: ["spak_jax.trace", files.trained, "12+3", "--out", files.new],
        functools.partial(_written, TRACED),
    ),
    "figures": Program(
        lambda files: ["spak_jax.figures", files.trained / run_folder.RESULTS, "--out", files.new],
        functools.partial(_written, DRAWN),
    ),
    "check": Program(
        lambda files: ["spak_jax.check", files.config], functools.partial(_says, ("small",))
    ),
    "brief": Program(
        lambda files: ["spak_jax.brief", files.config], functools.partial(_says, ("Tiny loop",))
    ),
    "convert": Program(lambda files: ["spak_jax.convert", files.original, files.new], _converted),
}
# The rest take their turns: each surroundings meets `train` and some of them.
TURNS = ("evaluate", "solve", "figures", "check", "trace", "brief", "convert")
# Their work is to print: where nobody reads, they may end by that.
PRINTING = ("solve", "check", "brief")

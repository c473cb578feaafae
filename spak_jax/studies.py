"""The experiments behind every table here: what is trained, and how it is scored.

`reproduce` runs them. A study is a list of experiments, each one configuration with all its seeds.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from spak_jax import addition
from spak_jax.config import Architecture, Config, parse_config, read_config

CONFIGS = Path("configs")


class Scoring(NamedTuple):
    """When a training's models are scored, and at how many loops; None for its end, and its own.

    kinds: whether on each kind of addition too (`addition.KINDS`). examples: problems a length;
    None for the study's.
    """

    step: int | None = None
    loops: int | None = None
    kinds: bool = False
    examples: int | None = None


class Experiment(NamedTuple):
    """One system's trainings, all seeds together, and their scorings in the order of steps."""

    config: Config
    scorings: tuple[Scoring, ...]


class Study(NamedTuple):
    """Experiments, the lengths that all are scored at, and problems a length.

    examples: of more than 100 digits fewer, as `evaluate.Settings` says.
    """

    experiments: list[Experiment]
    digits: tuple[int, ...]
    examples: int

    def with_examples(self, examples: int) -> "Study":
        """The same, every scoring with that many problems a length."""
        experiments = [
            experiment._replace(
                scorings=tuple(scoring._replace(examples=None) for scoring in experiment.scorings)
            )
            for experiment in self.experiments
        ]
        return self._replace(experiments=experiments, examples=examples)


def table(width: int, overrides: Sequence[str]) -> Study:
    """The seed's table, at the width of its runs or at that of the parameters it states."""
    # LoopLM-128e, by its name 128 wide, stands with the 256 ones.
    names = {
        256: ("gpt12", "loop12", "loop30", "loop128e"),
        768: ("gpt12-w768", "loop12-w768", "loop30-w768"),
    }[width]
    # Beside the trained 12 loops half, twice (in the seed's table), and further; LoopLM-30 also
    # where 30 loops have applied blocks as often as 12 do in their 15,000 steps.
    more = {
        "loop12": tuple(Scoring(loops=loops) for loops in (6, 18, 24, 48)),
        "loop30": (Scoring(step=6_000),),
    }
    experiments = []
    for name in names:
        scorings = (Scoring(), *more.get(name.removesuffix("-w768"), ()))
        ordered = sorted(scorings, key=lambda scoring: scoring.step or float("inf"))
        experiments.append(Experiment(_config(name, overrides), tuple(ordered)))
    return Study(experiments, (*range(1, 13), 16), 10_000)


def frontier(overrides: Sequence[str]) -> Study:
    """Told where digits align: every length to 100 digits, beyond, and, where trained so, loops."""
    experiments = []
    for name in ("frontier", "frontier-tiny"):
        config = _config(name, overrides)
        factors = (2, 4) if config.model.free_loops else ()
        deeper = (Scoring(loops=factor * config.model.loops, examples=1_000) for factor in factors)
        experiments.append(Experiment(config, (Scoring(kinds=True), *deeper)))
    return Study(experiments, (*range(1, 101), 200, 500, 1_000), 10_000)


def pointer(overrides: Sequence[str]) -> Study:
    """Told nothing of where digits align."""
    config = _config("pointer", overrides)
    lengths = (*range(1, 13), 16, 24, 32, 48, 64, 80, 100, 200, 500, 1_000)
    return Study([Experiment(config, (Scoring(kinds=True),))], lengths, 10_000)


def tasks(overrides: Sequence[str]) -> Study:
    """Subtraction and the addition of three numbers, with and without given ids."""
    experiments = []
    for base in ("frontier", "pointer"):
        for task in ("subtraction", "three-operands"):
            rows = max(addition.text_length(6, task) - 1, 24)
            config = _config(
                base,
                [
                    f'name="{base}-{task}"',
                    f'system.name="{_config(base, []).system}, {task}"',
                    f'data.task="{task}"',
                    f"data.row_length={rows}",
                    *overrides,
                ],
            )
            experiments.append(Experiment(config, (Scoring(),)))
    return Study(experiments, (*range(1, 13), 16, 32, 100), 10_000)


# Scheme, clip and window of the ablation, each with every one of its models.
SCHEMES = (
    ("rope", 1, False),
    ("random-rope", 1, False),
    ("none", 1, False),
    ("token-bias", 2, True),
    ("learned", 1, True),
    ("coupled-embedding", 1, False),
    ("coupled-rope", 1, False),
    ("coupled-bias", 1, False),
    ("coupled-bias", 1, True),
)
MODELS = (("gpt", 2), ("gpt", 4), ("loop", 2), ("loop", 4), ("loop", 8))


def ablation(overrides: Sequence[str]) -> Study:
    """What matters: every scheme with stacked and with looped blocks of several depths."""
    base = _config("ablation", overrides)
    shared = base.model.model_dump(include=set(Architecture.model_fields))
    experiments = []
    for scheme, clip, window in SCHEMES:
        told = f"{scheme}, window" if window else scheme
        placed = shared | {"positions": scheme, "clip": clip, "window": window}
        for kind, depth in MODELS:
            stacked = kind == "gpt"
            deep = {"layers" if stacked else "loops": depth}
            system = f"GPT, {depth} layers" if stacked else f"LoopLM, {depth} loops"
            changes = {
                "name": f"{told.replace(', ', '-')}-{kind}{depth}",
                "system": f"{system}, {told}",
                "model": placed | deep | {"kind": kind},
                "parallel": base.parallel.model_dump(mode="json"),
            }
            config = parse_config(base.model_dump(mode="json") | changes, base.name)
            experiments.append(Experiment(config, (Scoring(),)))
    return Study(experiments, (*range(1, 9), 10, 12, 16, 32, 100), 1_000)


def ideas(overrides: Sequence[str]) -> Study:
    """More that might reach longer numbers without being told where digits align, but did not.

    Loops trained to be repeated (input injected, state normalised, random depths), run as often as
    numbers are longer, with places turned by or with information that only neighbours pass on; and
    several problems a row.
    """
    repeated = [
        "model.inject_input=true",
        "model.normalize_state=true",
        "model.shared_step=true",
        "model.free_loops=12",
    ]
    local = ['model.positions="token-bias"', "model.clip=2", "model.window=true"]
    packed = ['data.layout="packed"', "data.row_length=64", "train.batch=96"]
    deeper = (Scoring(), Scoring(loops=16), Scoring(loops=64))
    kinds = {
        "rope-repeated": ("rope, repeatable loops", repeated, deeper),
        "random-rope-repeated": (
            "random-rope, repeatable loops",
            [*repeated, 'model.positions="random-rope"'],
            deeper,
        ),
        "token-bias-window-repeated": (
            "token-bias, window, repeatable loops",
            [*repeated, *local],
            deeper,
        ),
        "rope-packed": ("rope, packed rows", packed, (Scoring(),)),
    }
    experiments = []
    for name, (told, changes, scorings) in kinds.items():
        named = [f'name="{name}"', f'system.name="LoopLM, 4 loops, {told}"']
        config = _config("ablation", [*named, *changes, *overrides])
        experiments.append(Experiment(config, scorings))
    return Study(experiments, ablation([]).digits, 1_000)


STUDIES: dict[str, Callable[[Sequence[str]], Study]] = {
    "table-256": functools.partial(table, 256),
    "table-768": functools.partial(table, 768),
    "frontier": frontier,
    "pointer": pointer,
    "tasks": tasks,
    "ablation": ablation,
    "ideas": ideas,
}
# Trainings of each system, unless it is asked for other numbers of them.
SEEDS = {"table-768": 1, "ablation": 3, "ideas": 3}
MOST_SEEDS = 5


def _config(name: str, overrides: Sequence[str]) -> Config:
    return read_config(CONFIGS / f"{name}.toml", overrides)

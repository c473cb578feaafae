"""The experiments behind every table here: what is trained, and how it is scored.

`reproduce` runs them. A study is a list of experiments, each one configuration with all its seeds.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from spak_jax.command_line import InputError
from spak_jax.config import Config, leaves, parse_config, read_config
from spak_jax.config_files import specification_file
from spak_jax.config_sections import Architecture
from spak_jax.evaluation.loops import Loops
from spak_jax.experiments.peers import peers
from spak_jax.registry import TASKS


class Scoring(NamedTuple):
    """When a training's models are scored, and at how many loops; None for its end, and its own.

    loops: `Loops` for so many times each problem's length. kinds: whether on each of the task's
    hard problems too (`Task.kinds`). examples: problems a length at most; None for those of the
    configuration's evaluation.
    """

    step: int | None = None
    loops: int | Loops | None = None
    kinds: bool = False
    examples: int | None = None


class Experiment(NamedTuple):
    """One system's trainings, all seeds together, and their scorings in the order of steps.

    At which lengths, and how many problems of each, the configuration says (`evaluation`). drawn:
    the folder of figures that shows it, beside others of the same; empty for that of the study.
    """

    config: Config
    scorings: tuple[Scoring, ...]
    drawn: str = ""


def table(width: int, overrides: Sequence[str]) -> list[Experiment]:
    """The baseline's table, at the width of its runs or at that of the parameters it states."""
    # LoopLM-128e, by its name 128 wide, stands with the 256 ones.
    names = {
        256: ("gpt12", "loop12", "loop30", "loop128e"),
        768: ("gpt12-w768", "loop12-w768", "loop30-w768"),
    }[width]
    scored = _scored_at((*range(1, 13), 16), 10_000)
    configs = {name.removesuffix("-w768"): _config(name, overrides, sizes=scored) for name in names}
    # Beside the trained loops half, twice (in the baseline's table), and further; LoopLM-30 also
    # where it has applied its block as often as LoopLM-12 has at its end.
    more = {
        "loop12": _at_other_loops(configs["loop12"], (0.5, 1.5, 2, 4)),
        "loop30": _at_equal_work(configs["loop30"], configs["loop12"]),
    }
    experiments = []
    for name, config in configs.items():
        scorings = (Scoring(), *more.get(name, ()))
        ordered = sorted(scorings, key=lambda scoring: scoring.step or float("inf"))
        experiments.append(Experiment(config, tuple(ordered)))
    return experiments


def frontier(overrides: Sequence[str]) -> list[Experiment]:
    """Given position ids: every length to 100 digits, beyond, and, where trained so, loops."""
    scored = _scored_at((*range(1, 101), 200, 500, 1_000), 10_000)
    experiments = []
    for name in ("frontier", "frontier-tiny"):
        config = _config(name, overrides, sizes=scored)
        deeper = _at_other_loops(config, (2, 4) if config.model.no_grad_warmup_loops else ())
        deeper = (scoring._replace(examples=1_000) for scoring in deeper)
        experiments.append(Experiment(config, (Scoring(kinds=True), *deeper)))
    return experiments


def pointer(overrides: Sequence[str]) -> list[Experiment]:
    """Without position ids: the model learns them."""
    lengths = (*range(1, 13), 16, 24, 32, 48, 64, 80, 100, 200, 500, 1_000)
    config = _config("pointer", overrides, sizes=_scored_at(lengths, 10_000))
    return [Experiment(config, (Scoring(kinds=True),))]


def tasks(overrides: Sequence[str]) -> list[Experiment]:
    """Subtraction and the addition of three numbers, with and without given ids."""
    scored = _scored_at((*range(1, 13), 16, 32, 100), 10_000)
    experiments = []
    for base in ("frontier", "pointer"):
        for task in ("subtraction", "three-operands"):
            rows = max(TASKS.get(task)().text_length(6) - 1, 24)
            config = _config(
                base,
                overrides,
                name=f"{base}-{task}",
                system=f"{_config(base, []).system}, {task}",
                own=[f'data.task="{task}"'],
                sizes=[*scored, f"data.row_length={rows}"],
            )
            experiments.append(Experiment(config, (Scoring(),)))
    return experiments


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
ABLATION_LENGTHS = (*range(1, 9), 10, 12, 16, 32, 100)
MODELS = (("gpt", 2), ("gpt", 4), ("loop", 2), ("loop", 4), ("loop", 8))


def ablation(overrides: Sequence[str]) -> list[Experiment]:
    """What matters: every scheme with stacked and with looped blocks of several depths."""
    experiments = []
    for scheme, clip, window in SCHEMES:
        scheme_name = f"{scheme}, window" if window else scheme
        placed = [
            'model.kind="loop"',
            f'model.positions="{scheme}"',
            f"model.max_relative_distance={clip}",
            f"model.window={json.dumps(window)}",
        ]
        for kind, depth in MODELS:
            stacked = kind == "gpt"
            system = f"GPT, {depth} layers" if stacked else f"LoopLM, {depth} loops"
            config = _config(
                "ablation",
                overrides,
                name=f"{scheme_name.replace(', ', '-')}-{kind}{depth}",
                system=f"{system}, {scheme_name}",
                # Every system has its own depth, so a stack's is no override's either.
                own=[*placed, f"model.loops={depth}"],
                sizes=_scored_at(ABLATION_LENGTHS, 1_000),
            )
            experiments.append(
                Experiment(_stacked(config, depth) if stacked else config, (Scoring(),))
            )
    return experiments


def ideas(overrides: Sequence[str]) -> list[Experiment]:
    """More that might reach longer numbers without position ids, but did not.

    Loops trained to be repeated (input injected, state normalised, random depths), run as often as
    numbers are longer, with rotary positions or with information that only neighbours pass on; and
    several problems a row.
    """
    repeated = [
        "model.inject_input=true",
        "model.normalize_state=true",
        "model.shared_step=true",
        "model.no_grad_warmup_loops=12",
    ]
    turned = ['model.positions="rope"']
    randomly = ['model.positions="random-rope"']
    local = ['model.positions="token-bias"', "model.max_relative_distance=2", "model.window=true"]
    single, packed = ['data.layout="single"'], ['data.layout="packed"']
    # What makes a system what it is called; sizes; more loops at test time, as factors.
    systems = {
        "rope-repeated": (
            "rope, repeatable loops",
            [*repeated, *turned, *single],
            [],
            (4, 16),
        ),
        "random-rope-repeated": (
            "random-rope, repeatable loops",
            [*repeated, *randomly, *single],
            [],
            (4, 16),
        ),
        "token-bias-window-repeated": (
            "token-bias, window, repeatable loops",
            [*repeated, *local, *single],
            [],
            (4, 16),
        ),
        "rope-packed": (
            "rope, packed rows",
            [*turned, *packed],
            ["data.row_length=64", "train.batch=96"],
            (),
        ),
    }
    experiments = []
    for name, (description, own, sizes, factors) in systems.items():
        system = f"LoopLM, 4 loops, {description}"
        config = _config(
            "ablation",
            overrides,
            name=name,
            system=system,
            own=["model.loops=4", *own],
            sizes=[*_scored_at(ABLATION_LENGTHS, 1_000), *sizes],
        )
        scorings = (Scoring(), *_at_other_loops(config, factors))
        experiments.append(Experiment(config, scorings))
    return experiments


class Reach(NamedTuple):
    """How the study of depth scores a configuration.

    lengths: of problems. loops: what a problem is given for each of its symbols, with a few more
    for all. examples: problems a length, of each seed; the picture of lengths and loops has a tenth
    of them.
    """

    lengths: tuple[int, ...]
    loops: Loops
    # Five seeds have 12,800 problems of up to 100 symbols, 10,000 of 128, 1,250 of 1,024.
    examples: int = 2_560


ELEMENTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DEPTH = {
    "parity": Reach((4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), Loops(16, 2.0)),
    "addition-one-pass": Reach(
        (1, 2, 4, 6, 8, 12, 16, 32, 64, 100, 200, 500, 1000), Loops(16, 2.0)
    ),
    "s3": Reach(ELEMENTS, Loops(16, 2.0)),
    "s4": Reach(ELEMENTS, Loops(16, 2.0)),
    "s5": Reach(ELEMENTS, Loops(16, 2.0)),
    "hops": Reach((1, 2, 3, 4, 6, 8, 12, 16), Loops(16, 2.0)),
    # By rooms a side: paths grow with the square of it, and so does what a problem costs.
    "mazes": Reach((3, 4, 5, 7, 10, 15, 20, 30), Loops(64, 8.0), 500),
    "multiplication": Reach((2, 4, 8, 12, 16, 24, 32), Loops(48, 4.0)),
}
# In the picture of lengths and loops.
GRID_LOOPS = 1_024


def depth(overrides: Sequence[str]) -> list[Experiment]:
    """Answers in one pass, where loops alone carry information along: with loops that grow with a
    problem, and how far each number of them reaches; and what a looped block is compared with."""
    experiments = []
    for name, (lengths, grown, examples) in DEPTH.items():
        config = _config(name, overrides, sizes=_scored_at(lengths, examples))
        factors = [2**n for n in range((GRID_LOOPS // config.model.loops).bit_length())]
        grid = _at_other_loops(config, factors)
        grid = (each._replace(examples=examples // 10) for each in grid)
        experiments.append(Experiment(config, (Scoring(loops=grown, kinds=True), *grid), name))
        # A learning rate that is asked for is that of all.
        asked = config.train.learning_rate != _config(name, []).train.learning_rate
        compared = peers(config, 1.0) if asked else peers(config)
        experiments += (Experiment(peer, (Scoring(kinds=True),), name) for peer in compared)
    return experiments


STUDIES: dict[str, Callable[[Sequence[str]], list[Experiment]]] = {
    "table-256": functools.partial(table, 256),
    "table-768": functools.partial(table, 768),
    "frontier": frontier,
    "pointer": pointer,
    "tasks": tasks,
    "ablation": ablation,
    "ideas": ideas,
    "depth": depth,
}
# Trainings of each system, unless it is asked for other numbers of them.
SEEDS = {"table-768": 1, "ablation": 3, "ideas": 3}
MOST_SEEDS = 5


def _config(
    base: str,
    overrides: Sequence[str],
    *,
    name: str | None = None,
    system: str | None = None,
    own: Sequence[str] = (),
    sizes: Sequence[str] = (),
) -> Config:
    """The configuration of one of a study's systems.

    Args:
      base: the name of the file it starts from.
      overrides: the user's, for every system of the study.
      name, system: its names; None for those of the file.
      own: changes that make it what it is called, as overrides. No override of the user's may say
        otherwise.
      sizes: changes that give way to the user's.

    Raises:
      InputError: an override contradicts what the system is, or is not allowed.
    """
    path = specification_file(base)
    plain = read_config(path)
    name, system = name or plain.name, system or plain.system
    own = [f"name={json.dumps(name)}", f"system.name={json.dumps(system)}", *own]
    try:
        config = read_config(path, [*sizes, *overrides, *own])
        # The same where the last word is the user's: no reading of their syntax is needed here.
        asked = dict(leaves(read_config(path, [*sizes, *own, *overrides]).model_dump()))
    except InputError as error:
        # What is missing with an override need not be what it names.
        raise InputError(f"{name} with {' '.join(overrides)}: {error}") from None
    for key, value in leaves(config.model_dump()):
        if asked.get(key) != value:
            # A configuration keeps the system's name alone.
            key = "system.name" if key == "system" else key
            raise InputError(
                f"override of {key}: {value!r} is what makes {name} of this study; train a"
                " configuration of your own instead"
            )
    return config


def _stacked(config: Config, layers: int) -> Config:
    """A looped model's configuration with as many blocks of their own instead.

    Raises:
      InputError: an override asks of it what only loops have.
    """
    shared = set(Architecture.model_fields)
    looped = config.model.model_dump(exclude={*shared, "kind", "loops"}, exclude_defaults=True)
    for key in looped:
        raise InputError(f"override of model.{key}: {config.name} is a stack of blocks, without it")
    stack = config.model.model_dump(include=shared) | {"kind": "gpt", "layers": layers}
    parallel = config.parallel.model_dump(mode="json")
    changes = {"model": stack, "parallel": parallel}
    return parse_config(config.model_dump(mode="json") | changes, config.name)


def _scored_at(lengths: Sequence[int], examples: int) -> list[str]:
    """Overrides that say where a study scores, and on how many problems a length."""
    return [f"evaluation.lengths={list(lengths)}", f"evaluation.examples={examples}"]


def _at_other_loops(config: Config, factors: Sequence[float]) -> tuple[Scoring, ...]:
    """A training's end scored at multiples of its loops, as far as they are whole."""
    asked = (float(factor * config.model.loops) for factor in factors)
    return tuple(Scoring(loops=int(loops)) for loops in asked if loops.is_integer())


def _at_equal_work(config: Config, peer: Config) -> tuple[Scoring, ...]:
    """Where a looped model has applied its block as often as a peer has at the end of its training.

    Nowhere, where it is trained no longer than that.
    """
    step = peer.train.steps * peer.model.loops // config.model.loops
    return (Scoring(step=step),) if 1 <= step < config.train.steps else ()

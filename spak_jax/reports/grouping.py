"""Results files as systems evaluated: grouped by what differs, named, estimated over seeds.

What figures and tables share. It knows nothing of models.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from spak_jax.config import leaves as nested_leaves
from spak_jax.evaluation.results import LengthScore, Results
from spak_jax.evaluation.statistics import OVER_SEEDS, WILSON, Estimate, estimate

# Besides the configuration, what makes an evaluation what it is.
IDENTITY = (
    "system", "loops", "loops_per_symbol", "halting", "problems", "step", "method", "dtype",
    "examples", "seed",
)  # fmt: skip

# The kind of model that knows positions by reading in order, by no scheme.
RECURRENT = "gru"

Item = TypeVar("Item")


class Tally(NamedTuple):
    """Wrong answers of all, over all training seeds and these lengths, which rise."""

    wrong: int
    total: int
    lengths: list[int]


@dataclass(frozen=True)
class Evaluated:
    """One system evaluated in one way: a line of a figure, a row of the table.

    label: its name in legends. results: one for each training seed, by rising seed.
    """

    label: str
    results: tuple[Results, ...]

    @property
    def first(self) -> Results:
        return self.results[0]

    @property
    def lengths(self) -> list[int]:
        return sorted({int(length) for results in self.results for length in results.lengths})

    @property
    def kinds(self) -> list[str]:
        """Kinds of problems that were scored beside the plain ones, in the order of the files."""
        return list(dict.fromkeys(k for r in self.results for k, found in r.kinds.items() if found))

    def at_length(self, length: int) -> Estimate | None:
        """Accuracy at a length; None where it was not scored."""
        return estimate(self._scores(length))

    def seeds_at(self, length: int) -> int:
        """How many training seeds were scored at a length."""
        return len(self._scores(length))

    def in_column(self, column: str) -> Estimate | None:
        """Accuracy in a published column; None where it was not scored."""
        return estimate(
            [r.published_columns[column] for r in self.results if column in r.published_columns]
        )

    def tally(self, kind: str | None = None) -> Tally | None:
        """Answers to problems of a kind, or to the plain ones; None where none was scored."""
        by_seed = [r.lengths if kind is None else r.kinds.get(kind, {}) for r in self.results]
        scores = [(int(n), score) for found in by_seed for n, score in found.items()]
        if not scores:
            return None
        return Tally(
            sum(score.total - score.correct for _, score in scores),
            sum(score.total for _, score in scores),
            sorted({n for n, _ in scores}),
        )

    def is_zero_shot(self, length: int) -> bool:
        return any(score.zero_shot for score in self._scores(length))

    def _scores(self, length: int) -> list[LengthScore]:
        return [r.lengths[str(length)] for r in self.results if str(length) in r.lengths]


def gather(files: Sequence[tuple[Path, Results]]) -> tuple[list[Evaluated], list[str]]:
    """Results files as systems evaluated, runs that differ in nothing but train.seed together.

    A run that was scored at other lengths in another file gains them; what two files both hold is
    taken from the first.

    Returns:
      The systems in the order of the files, and a sentence for each file that adds nothing.
    """
    systems, repeats = [], []
    for group in _grouped(files, lambda file: _identity(file[1])):
        runs: dict[int, tuple[Path, Results]] = {}
        for path, results in group:
            seed = results.config.train.seed
            earlier_path, earlier = runs.setdefault(seed, (path, results))
            if results is earlier:
                continue
            merged = _merged(earlier, results)
            if merged == earlier:
                repeats.append(f"{path} is the same evaluation as {earlier_path}: drawn once")
            runs[seed] = earlier_path, merged
        systems.append(tuple(runs[seed][1] for seed in sorted(runs)))
    names = [_name(runs[0]) for runs in systems]
    labels = _distinct_labels(names, [_identity(runs[0]) for runs in systems])
    return [Evaluated(*line) for line in zip(labels, systems, strict=True)], repeats


def loop_families(evaluated: Sequence[Evaluated]) -> list[tuple[str, list[Evaluated]]]:
    """Evaluations that differ in nothing but loops, where there are at least two.

    Returns:
      Of each family its label and its evaluations by rising number of loops.
    """

    def family(line: Evaluated) -> dict[str, Any]:
        return _identity(line.first) | {"loops": None}

    looped = [
        line
        for line in evaluated
        if line.first.loops is not None and line.first.loops_per_symbol is None
    ]
    families = [
        sorted(lines, key=lambda line: line.first.loops)
        for lines in _grouped(looped, family)
        if len(lines) > 1
    ]
    names = [_name(lines[0].first, with_loops=False) for lines in families]
    labels = _distinct_labels(names, [family(lines[0]) for lines in families])
    return list(zip(labels, families, strict=True))


def training_families(evaluated: Sequence[Evaluated]) -> list[tuple[int, Evaluated]]:
    """Runs that kept a training curve, each once with its longest, those of one system together.

    Returns:
      Of each system the index in `evaluated` of its first evaluation, and its runs.
    """
    kept = [(i, r) for i, line in enumerate(evaluated) for r in line.results if r.training.step]
    systems = _grouped(kept, lambda run: _training_settings(run[1]))
    firsts = [runs[0][1] for runs in systems]
    labels = _distinct_labels([_system(r) for r in firsts], [_training_settings(r) for r in firsts])
    families = []
    for label, runs in zip(labels, systems, strict=True):
        by_end = sorted((results for _, results in runs), key=lambda r: r.training.step[-1])
        longest = {results.config.train.seed: results for results in by_end}
        family = Evaluated(label, tuple(longest[seed] for seed in sorted(longest)))
        families.append((runs[0][0], family))
    return families


def scheme_families(evaluated: Sequence[Evaluated]) -> list[tuple[str, list[Evaluated]]]:
    """Evaluations by how their models know positions, where there are at least two schemes.

    Returns:
      Of each scheme, with and without a window, its label and its evaluations. Theirs name kind
      and depth of the model, so that the same model has the same label in every family, and what
      else it takes to tell those of one family apart.
    """
    models = [line.first.config.model for line in evaluated]
    if len({model.positions for model in models if model.kind != RECURRENT}) < 2:
        return []
    families = []
    for lines in _grouped(evaluated, lambda line: _scheme(line.first)):
        names = [_depth(line.first) + _circumstances(line.first) for line in lines]
        labels = _distinct_labels(names, [_beside_the_scheme(line.first) for line in lines])
        positions, window = _scheme(lines[0].first).values()
        relabelled = [
            Evaluated(label, line.results) for label, line in zip(labels, lines, strict=True)
        ]
        families.append((positions + ", window" * window, relabelled))
    return families


def length_unit(evaluated: Sequence[Evaluated]) -> str:
    """What lengths count, "digits" or, where systems differ, "digits or symbols"."""
    return " or ".join(dict.fromkeys(line.first.length_unit for line in evaluated))


def origin(results: Sequence[Results]) -> str:
    """Devices, dates and training seeds in words."""
    devices = ", ".join(dict.fromkeys(r.device for r in results))
    first, last = min(r.date for r in results), max(r.date for r in results)
    dates = f"{first}" if first == last else f"{first} to {last}"
    seeds = {r.config.train.seed for r in results}
    return f"{devices}, {dates}, training seed{'s' if len(seeds) > 1 else ''} {ranges(seeds)}"


def problem_counts(results: Sequence[Results]) -> str:
    """How many problems were scored, in words."""
    drawn = sorted({r.examples for r in results if not r.problems})
    own = sorted({(r.problems, r.examples) for r in results if r.problems})
    parts = [f"{' or '.join(f'{n:,}' for n in drawn)} problems a length"] if drawn else []
    # The evaluator draws fewer of the longest.
    if any(s.total < r.examples for r in results if not r.problems for s in r.lengths.values()):
        parts = [f"at most {parts[0]}"]
    parts += [f"{count:,} problems in {' '.join(name.split())}" for name, count in own]
    return ", ".join(parts)


def interval_kind(evaluated: Sequence[Evaluated]) -> str:
    """What the intervals are, in words."""
    several = {len(line.results) > 1 for line in evaluated}
    if several == {True}:
        return OVER_SEEDS
    return f"{WILSON}; where there are several seeds, {OVER_SEEDS}" if True in several else WILSON


def seed_note(counts: Iterable[int]) -> str:
    """What a label says of the numbers of training seeds behind its points; one goes unsaid."""
    counts = set(counts)
    fewest, most = min(counts), max(counts)
    if fewest < most:
        return f", {fewest} to {most} seeds"
    return f", {most} seeds" if most > 1 else ""


def _grouped(
    items: Iterable[Item], settings: Callable[[Item], Mapping[str, Any]]
) -> list[list[Item]]:
    """Items with equal settings together, in the order in which they first appear."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(json.dumps(settings(item), sort_keys=True), []).append(item)
    return list(groups.values())


def _identity(results: Results) -> dict[str, Any]:
    """All that makes an evaluation what it is, but the training seed."""
    identity = {name: getattr(results, name) for name in IDENTITY}
    # Files from before there was a choice do not name it.
    identity["halting_rule"] = results.halting_rule or (results.halting and "confidence")
    return identity | {"config": _training_settings(results)}


def _training_settings(results: Results) -> dict[str, Any]:
    """The configuration that made the weights, but the training seed.

    How they are scored by default has no part in it.
    """
    config = results.config.model_dump()
    config.pop("evaluation", None)
    del config["train"]["seed"]
    return config


def _merged(earlier: Results, later: Results) -> Results:
    return earlier.model_copy(
        update={
            "lengths": {**later.lengths, **earlier.lengths},
            "published_columns": {**later.published_columns, **earlier.published_columns},
            "kinds": {
                kind: {**later.kinds.get(kind, {}), **earlier.kinds.get(kind, {})}
                for kind in (earlier.kinds | later.kinds)
            },
            "training": earlier.training if earlier.training.step else later.training,
        }
    )


def _system(results: Results) -> str:
    return " ".join(results.system.split())


def _name(results: Results, with_loops: bool = True) -> str:
    name = _system(results)
    if with_loops and not _as_trained(results):
        name += f" at {results.loops_label} loops"
    return name + _circumstances(results)


def _circumstances(results: Results) -> str:
    """What a name says of an evaluation that is not a plain one."""
    circumstances = ", halting" if results.halting else ""
    if results.halting_rule:
        circumstances += f" by {results.halting_rule}"
    if results.on_the_way:
        circumstances += f" after {results.step:,} of {results.config.train.steps:,} steps"
    if results.problems:
        circumstances += f", on {' '.join(results.problems.split())}"
    return circumstances


def _scheme(results: Results) -> dict[str, Any]:
    model = results.config.model
    # It has no scheme to choose, and stands for itself beside those of others.
    positions = "recurrence" if model.kind == RECURRENT else model.positions
    return {"positions": positions, "window": model.window}


def _depth(results: Results) -> str:
    """`GPT, 2 layers`, `GRU, 1 layer`, `LoopLM, 4 loops` or, with another number at test time,
    `..., at 8`."""
    model = results.config.model
    if model.loops is not None:
        kind, count, unit = "LoopLM", model.loops, "loop"
    else:
        kind, count, unit = "GRU" if model.kind == RECURRENT else "GPT", model.layers, "layer"
    depth = kind if count is None else f"{kind}, {count} {unit}{'s' if count > 1 else ''}"
    return depth if _as_trained(results) else f"{depth}, at {results.loops_label}"


def _as_trained(results: Results) -> bool:
    """Whether a model was scored at the loops of its training, or has none to choose."""
    return results.loops == results.config.model.loops and results.loops_per_symbol is None


def _beside_the_scheme(results: Results) -> dict[str, Any]:
    """All that makes an evaluation what it is, but the scheme; names, which may hold it, last."""
    identity = _identity(results)
    config = identity.pop("config")
    config["model"] = {k: v for k, v in config["model"].items() if k not in _scheme(results)}
    names = {"name": config.pop("name"), "system": identity.pop("system")}
    config.pop("system", None)
    return config | identity | names


def _distinct_labels(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names; those that are the same get as many of their differing settings as it takes."""
    labels = list(names)
    leaves = [dict(nested_leaves(values)) for values in settings]
    for name in set(names):
        same = [i for i, other in enumerate(names) if other == name]
        for path in dict.fromkeys(path for i in same for path in leaves[i]):
            if len({labels[i] for i in same}) == len(same):
                break
            if len({repr(leaves[i].get(path)) for i in same}) > 1:
                for i in same:
                    labels[i] += f", {path} {leaves[i].get(path, 'absent')}"
    return labels


def ranges(numbers: Iterable[int]) -> str:
    """`0-4, 7` for 0, 1, 2, 3, 4, 7."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    parts = []
    for _, run in runs:
        first, *others = [number for _, number in run]
        parts.append(f"{first}-{others[-1]}" if others else f"{first}")
    return ", ".join(parts)

"""Results files to figures and tables: `python -m spak_jax.figures RESULTS.json ... [--out DIR]`.

It reads what `spak_jax.evaluate` writes and knows nothing of models. All input is checked and all
output is built in memory before the first file is written.
"""

import argparse
import datetime
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.stats import t as student_t

from spak_jax.command_line import InputError, console, run_program, writable_folder

# The seed's columns by the name it gives them, and the digits of the longer operand they hold.
SEED_COLUMNS = {"1-4": "1-4", "5-6": "5-7", "8": "8-9", "10": "10-11", "12": "12"}

# The seed's table in percent, in the order of SEED_COLUMNS, by (config.name, loops).
PUBLISHED = {
    ("gpt12", None): (100.0, 61.90, 0.0, 0.0, 0.0),
    ("loop12", 12): (100.0, 80.00, 0.0, 0.0, 0.0),
    ("loop30", 30): (100.0, 95.24, 2.59, 0.0, 0.0),
    ("loop128e", 24): (100.0, 76.19, 0.0, 0.0, 0.0),
    ("loop12", 24): (100.0, 78.10, 0.0, 0.0, 0.0),
}

# Both operands exactly that long; shown in the table where scored.
STRICT_LENGTHS = (7, 8, 10, 12)

CONFIDENCE = 0.95
LOG_AXIS_OVER = 40
# A column whose accuracies over all numbers of loops lie closer than this tells nothing of loops.
INFORMATIVE_SPREAD = 0.01

# Okabe and Ito's palette without its yellow, which is lost on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    # System names are text; a dollar sign in one is no formula.
    "text.parse_math": False,
}
GREY = "0.45"

# Inches. Single column and one and a half columns of a two-column page.
SINGLE, WIDE = 3.4, 5.2
LEFT, RIGHT = 0.52, 0.1
# Above the axes, for a note in small print and for a line of a title.
NOTE, TITLE_LINE = 0.2, 0.15
# From the axes down to where the legend may begin: tick labels and the axis label.
UNDER_AXES = 0.42
LEGEND_LINE, CAPTION_LINE, PAD = 0.135, 0.11, 0.06

LegendEntry = tuple[Line2D, str]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Loss = Annotated[float, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
# Six digits at most, and none of them a leading zero: one length has one spelling.
Length = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Score(Part):
    """Accuracy on some problems, a fraction, with its 95% interval."""

    correct: Count
    total: Annotated[Count, Field(ge=1)]
    accuracy: Fraction
    low: Fraction
    high: Fraction
    zero_shot: bool

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if not math.isclose(self.accuracy, self.correct / self.total, abs_tol=1e-6):
            raise ValueError(
                f"accuracy = {self.accuracy:g} must be correct / total = {self.correct} /"
                f" {self.total}"
            )
        if not self.low - 1e-6 <= self.accuracy <= self.high + 1e-6:
            raise ValueError(
                f"low = {self.low:g}, high = {self.high:g} must enclose accuracy ="
                f" {self.accuracy:g}"
            )
        return self


class ConfiguredModel(Part):
    # The whole section tells one system from another, so unknown keys are kept.
    model_config = ConfigDict(extra="allow")
    loops: Annotated[Count, Field(ge=1)] | None = None


class ConfiguredTraining(Part):
    model_config = ConfigDict(extra="allow")
    seed: Count


class StoredConfig(Part):
    """The configuration of the run: what is read here, and all else, to compare runs by."""

    model_config = ConfigDict(extra="allow")
    name: Name
    model: ConfiguredModel
    train: ConfiguredTraining


class Curve(Part):
    """Losses over training steps; all lists empty where the run kept no metrics."""

    step: tuple[Count, ...] = ()
    loss: tuple[Loss, ...] = ()
    validation_step: tuple[Count, ...] = ()
    validation_loss: tuple[Loss, ...] = ()

    @model_validator(mode="after")
    def _as_many_losses_as_steps(self) -> Self:
        if len(self.step) != len(self.loss):
            raise ValueError(f"{len(self.step)} values in step, {len(self.loss)} in loss")
        if len(self.validation_step) != len(self.validation_loss):
            raise ValueError(
                f"{len(self.validation_step)} values in validation_step,"
                f" {len(self.validation_loss)} in validation_loss"
            )
        return self


class Results(Part):
    """A results file as `spak_jax.evaluate` writes it; keys not named here are ignored."""

    system: Name
    config: StoredConfig
    parameters: Annotated[Count, Field(ge=1)]
    step: Count
    loops: Annotated[Count, Field(ge=1)] | None
    examples: Annotated[Count, Field(ge=1)]
    seed: Count
    device: Name
    date: datetime.date
    lengths: Annotated[dict[Length, Score], Field(min_length=1)]
    seed_columns: dict[str, Score]
    commit: Name | None = None
    halting: tuple[Fraction, ...] | None = None
    method: str = ""
    dtype: str = ""
    problems: Name | None = None
    training: Curve = Curve()

    @model_validator(mode="after")
    def _loops_fit_the_model(self) -> Self:
        if (self.loops is None) != (self.config.model.loops is None):
            raise ValueError(
                f"loops = {self.loops} and config.model.loops = {self.config.model.loops}: both"
                " or neither must be a number"
            )
        return self


class Estimate(NamedTuple):
    """An accuracy, a fraction, its 95% interval, and how many training seeds it comes from."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Evaluated:
    """One system evaluated in one way: a line of a figure, a row of the table.

    label: its name in legends. key: what tells it from others, as nested plain values.
    results: one for each training seed, by rising seed.
    """

    label: str
    key: Mapping[str, Any]
    results: tuple[Results, ...]

    @property
    def first(self) -> Results:
        return self.results[0]

    @property
    def lengths(self) -> list[int]:
        return sorted({int(length) for results in self.results for length in results.lengths})

    def at_length(self, digits: int) -> Estimate | None:
        """Accuracy at a length; None where it was not scored."""
        return estimate([r.lengths[str(digits)] for r in self.results if str(digits) in r.lengths])

    def in_column(self, column: str) -> Estimate | None:
        """Accuracy in one of the seed's columns; None where it was not scored."""
        return estimate([r.seed_columns[column] for r in self.results if column in r.seed_columns])

    def is_zero_shot(self, digits: int) -> bool:
        return any(
            r.lengths[str(digits)].zero_shot for r in self.results if str(digits) in r.lengths
        )


def read_results(path: Path) -> Results:
    """A results file, checked.

    Raises:
      InputError: it cannot be read, is not JSON, or a key is missing or holds what it must not.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the results file {path}: {error.strerror}") from None
    if not content.strip():
        raise InputError(f"{path} is empty: expected {EXPECTED}")
    try:
        return Results.model_validate_json(content)
    except ValidationError as error:
        first, *others = (_explain(problem) for problem in error.errors())
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{path}: {first}{more}") from None


EXPECTED = "a results file as `python -m spak_jax.evaluate RUN --json FILE` writes it"


def _explain(problem: Any) -> str:
    """One of pydantic's findings in one line, the key first."""
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    match problem["type"]:
        case "json_invalid":
            return f"not JSON ({problem['ctx']['error']}): expected {EXPECTED}"
        case "missing":
            return f"{key} is missing: expected {EXPECTED}"
        case "value_error":
            return f"{key or 'results'}: {problem['ctx']['error']}"
    if not key:
        return f"expected an object with keys such as system and lengths: {EXPECTED}"
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key} = {shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def estimate(scores: Sequence[Score]) -> Estimate | None:
    """The accuracy that one score, or one score for each training seed, tells.

    One score keeps its own interval. Several give their mean with Student's interval of the mean
    over seeds, clipped to 0..1. No score gives None.
    """
    if not scores:
        return None
    if len(scores) == 1:
        return Estimate(scores[0].accuracy, scores[0].low, scores[0].high, 1)
    accuracies = np.array([score.accuracy for score in scores])
    mean = float(accuracies.mean())
    error = float(accuracies.std(ddof=1)) / math.sqrt(len(scores))
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)) * error
    return Estimate(mean, max(mean - reach, 0.0), min(mean + reach, 1.0), len(scores))


def gather(files: Sequence[tuple[Path, Results]]) -> tuple[list[Evaluated], list[str]]:
    """Results files as systems evaluated, runs that differ in nothing but train.seed together.

    A run that was scored at other lengths in another file gains them; what two files both hold is
    taken from the first.

    Returns:
      The systems in the order of the files, and a sentence for each file that adds nothing.
    """
    groups: dict[str, tuple[dict[str, Any], dict[int, tuple[Path, Results]]]] = {}
    repeats = []
    for path, results in files:
        key = _key(results)
        _, runs = groups.setdefault(json.dumps(key, sort_keys=True), (key, {}))
        seed = results.config.train.seed
        if seed not in runs:
            runs[seed] = path, results
            continue
        earlier_path, earlier = runs[seed]
        merged = _merged(earlier, results)
        if merged == earlier:
            repeats.append(f"{path} is the same evaluation as {earlier_path}: drawn once")
        runs[seed] = earlier_path, merged
    evaluated = []
    for key, runs in groups.values():
        by_seed = tuple(runs[seed][1] for seed in sorted(runs))
        evaluated.append(Evaluated(_name(by_seed[0]), key, by_seed))
    return _told_apart(evaluated), repeats


def _key(results: Results) -> dict[str, Any]:
    """All that makes an evaluation what it is, but the training seed."""
    return {
        "system": results.system,
        "loops": results.loops,
        "halting": results.halting,
        "problems": results.problems,
        "step": results.step,
        "method": results.method,
        "dtype": results.dtype,
        "examples": results.examples,
        "seed": results.seed,
        "config": _run_key(results, with_seed=False),
    }


def _run_key(results: Results, with_seed: bool) -> dict[str, Any]:
    """The configuration that made the weights; how they are scored by default has no part in it."""
    config = results.config.model_dump()
    config.pop("evaluation", None)
    if not with_seed:
        del config["train"]["seed"]
    return config


def _merged(earlier: Results, later: Results) -> Results:
    return earlier.model_copy(
        update={
            "lengths": {**later.lengths, **earlier.lengths},
            "seed_columns": {**later.seed_columns, **earlier.seed_columns},
            "training": earlier.training if earlier.training.step else later.training,
        }
    )


def _system(results: Results) -> str:
    return " ".join(results.system.split())


def _name(results: Results, with_loops: bool = True) -> str:
    name = _system(results)
    if with_loops and results.loops != results.config.model.loops:
        name += f" at {results.loops} loops"
    if results.halting:
        name += ", halting"
    if results.problems:
        name += f", on {' '.join(results.problems.split())}"
    return name


def _told_apart(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """The same systems; those that share a label get as many differing settings as it takes."""
    labels = [line.label for line in evaluated]
    leaves = [dict(_leaves(line.key)) for line in evaluated]
    for label in set(labels):
        same = [i for i, other in enumerate(labels) if other == label]
        for path in dict.fromkeys(path for i in same for path in leaves[i]):
            if len({labels[i] for i in same}) == len(same):
                break
            if len({repr(leaves[i].get(path)) for i in same}) > 1:
                for i in same:
                    labels[i] += f", {path} {leaves[i].get(path, 'absent')}"
    return [replace(line, label=label) for line, label in zip(evaluated, labels, strict=True)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def draw_generalization(evaluated: Sequence[Evaluated]) -> Figure:
    """Accuracy over operand length, a line for each system: the seed's Figure 1."""
    longest = max(line.lengths[-1] for line in evaluated)
    logarithmic = longest > LOG_AXIS_OVER
    entries = [
        (_sample(i), line.label + _seeds_told([line.at_length(n) for n in line.lengths]))
        for i, line in enumerate(evaluated)
    ]
    caption = (
        f"{_provenance(evaluated)}. Bars: {_interval_kind(evaluated)}. Filled markers: lengths of"
        " the training law; open: zero-shot."
    )
    if len(evaluated) > 1:
        caption += " Lines are set slightly apart sideways."
    figure, [axes] = _canvas(WIDE, 2.3, NOTE, 1, entries, caption)
    for i, line in enumerate(evaluated):
        _draw_lengths(axes, line, i, _aside(i, len(evaluated), logarithmic), logarithmic)
    _length_axis(axes, evaluated, logarithmic)
    _accuracy_axis(axes)
    _mark_training_law(axes, evaluated, logarithmic)
    return figure


def _aside(index: int, count: int, logarithmic: bool) -> float:
    """How far a line is moved sideways so that equal accuracies stay visible side by side."""
    offset = (index - (count - 1) / 2) * min(0.09, 0.5 / count)
    return offset * 0.1 if logarithmic else offset


def _draw_lengths(axes: Axes, line: Evaluated, index: int, aside: float, logarithmic: bool) -> None:
    lengths = np.array(line.lengths, float)
    x = lengths * np.exp(aside) if logarithmic else lengths + aside
    _draw_estimates(
        axes,
        x,
        [line.at_length(n) for n in line.lengths],
        index,
        is_open=[line.is_zero_shot(n) for n in line.lengths],
    )


def _draw_estimates(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    estimates: Sequence[Estimate],
    index: int,
    is_open: Sequence[bool],
) -> None:
    style = _line_style(index)
    y = np.array([100 * e.mean for e in estimates])
    # Rounding may leave a bound a hair on the wrong side of the mean.
    below = np.maximum(y - [100 * e.low for e in estimates], 0)
    above = np.maximum([100 * e.high for e in estimates] - y, 0)
    axes.plot(x, y, color=style["color"], linestyle=style["linestyle"], zorder=2 + index / 100)
    axes.errorbar(
        x, y, yerr=[below, above], fmt="none", ecolor=style["color"], elinewidth=0.7, zorder=2
    )
    for place, height, hollow in zip(x, y, is_open, strict=True):
        axes.plot(
            [place],
            [height],
            marker=style["marker"],
            color=style["color"],
            markerfacecolor="white" if hollow else style["color"],
            markeredgewidth=0.8,
            linestyle="none",
            zorder=3 + index / 100,
        )


def _length_axis(axes: Axes, evaluated: Sequence[Evaluated], logarithmic: bool) -> None:
    own, strict = (
        any(bool(line.first.problems) == asked for line in evaluated) for asked in (True, False)
    )
    operands = {
        (False, True): "both operands exactly this long",
        (True, False): "the longer operand",
        (True, True): "both operands; own problems: the longer one",
    }[own, strict]
    axes.set_xlabel(f"digits ({operands})")
    shortest = min(line.lengths[0] for line in evaluated)
    longest = max(line.lengths[-1] for line in evaluated)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 1.15, longest * 1.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(shortest - 0.5, longest + 0.5)
        _integer_ticks(axes, shortest, longest)


def _integer_ticks(axes: Axes, first: int, last: int) -> None:
    if last - first <= 20:
        axes.set_xticks(range(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylabel("whole answers right (%)")
    # A little more than 0 to 100, so that markers at either end are not cut.
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.spines["left"].set_bounds(0, 100)
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)


def _mark_training_law(axes: Axes, evaluated: Sequence[Evaluated], logarithmic: bool) -> None:
    """Shades the lengths below the first zero-shot one and names both sides of the border."""
    left, right = axes.get_xlim()
    zero_shot = {n for line in evaluated for n in line.lengths if line.is_zero_shot(n)}
    trained = {n for line in evaluated for n in line.lengths if not line.is_zero_shot(n)}
    first_beyond = min(zero_shot, default=math.inf)
    below = [n for n in trained if n < first_beyond]
    if not zero_shot:
        edge = right
    elif not below:
        edge = left
    elif logarithmic:
        edge = math.sqrt(max(below) * first_beyond)
    else:
        edge = (max(below) + first_beyond) / 2
    where = {"transform": axes.get_xaxis_transform(), "color": GREY, "fontsize": 7, "va": "bottom"}
    if below:
        axes.axvspan(left, edge, color="0.94", linewidth=0, zorder=0)
        axes.text(edge, 1.01, "in the training law  ", ha="right", **where)
    if zero_shot:
        # Systems of other training laws may share the figure.
        for_some = " for some" if len(below) < len(trained) else ""
        axes.axvline(edge, color=GREY, linewidth=0.6, zorder=1)
        axes.text(edge, 1.01, f"  zero-shot{for_some}", ha="left", **where)


def draw_test_time_loops(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Accuracy over loops at inference, a panel for each system: the seed's Figure 2.

    Returns:
      None where no system was evaluated at two numbers of loops.
    """
    families = _loop_families(evaluated)
    if not families:
        return None
    series = {name: _series(lines) for name, lines in families.items()}
    drawn = {name: _informative(values) for name, values in series.items()}
    names = list(dict.fromkeys(line for values in drawn.values() for line in values))
    entries = [(_sample(i), name) for i, name in enumerate(names)]
    members = [line for lines in families.values() for line in lines]
    titles = {
        name: _lines(name + _seeds_told(e for v in values.values() for e in v.values()), 38)
        for name, values in drawn.items()
    }
    figure, panels = _canvas(
        SINGLE if len(families) == 1 else WIDE,
        1.9,
        NOTE + TITLE_LINE * max(len(lines) for lines in titles.values()),
        len(families),
        entries,
        f"{_provenance(members)}. Bars: {_interval_kind(members)}.{_left_out(series, drawn)}",
    )
    for axes, (name, lines) in zip(panels, families.items(), strict=True):
        axes.set_title("\n".join(titles[name]), pad=12)
        for line_name, values in drawn[name].items():
            _draw_estimates(
                axes,
                list(values),
                list(values.values()),
                names.index(line_name),
                is_open=[False] * len(values),
            )
        _loop_axis(axes, lines)
        _accuracy_axis(axes)
    return figure


def _loop_families(evaluated: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """By label, the evaluations that differ in nothing but loops, where there are at least two."""
    families: dict[str, list[Evaluated]] = {}
    for line in evaluated:
        if line.first.loops is not None:
            key = json.dumps({**line.key, "loops": None}, sort_keys=True)
            families.setdefault(key, []).append(line)
    several = [
        sorted(lines, key=lambda line: line.first.loops)
        for lines in families.values()
        if len(lines) > 1
    ]
    named = _told_apart(
        [
            Evaluated(
                _name(lines[0].first, with_loops=False),
                {**lines[0].key, "loops": None},
                lines[0].results,
            )
            for lines in several
        ]
    )
    return {family.label: lines for family, lines in zip(named, several, strict=True)}


def _series(lines: Sequence[Evaluated]) -> dict[str, dict[int, Estimate]]:
    """By column or, where a family has no columns, by length: estimates by number of loops."""
    series: dict[str, dict[int, Estimate]] = {}
    for line in lines:
        for column, held in SEED_COLUMNS.items():
            if found := line.in_column(column):
                series.setdefault(f"{held} digits", {})[line.first.loops] = found
    if not series:
        for line in lines:
            for length in line.lengths:
                name = f"{length} digit{'s' if length > 1 else ''}"
                series.setdefault(name, {})[line.first.loops] = line.at_length(length)
    return series


def _informative(series: dict[str, dict[int, Estimate]]) -> dict[str, dict[int, Estimate]]:
    """Those that change with the number of loops; all of them where none does."""
    spread = {
        name: max(e.mean for e in values.values()) - min(e.mean for e in values.values())
        for name, values in series.items()
    }
    changing = {n: v for n, v in series.items() if spread[n] >= INFORMATIVE_SPREAD}
    return changing or series


def _left_out(series: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    """A sentence on what the figure leaves out, by family where there are several."""
    constant = {
        family: ", ".join(
            f"{name} ({100 * next(iter(estimates.values())).mean:.0f}%)"
            for name, estimates in values.items()
            if name not in drawn[family]
        )
        for family, values in series.items()
    }
    told = [
        f"{family}: {names}" if len(series) > 1 else names
        for family, names in constant.items()
        if names
    ]
    if not told:
        return ""
    return f" Not drawn, as loops change them by less than a point: {'; '.join(told)}."


def _loop_axis(axes: Axes, lines: Sequence[Evaluated]) -> None:
    loops = [line.first.loops for line in lines]
    trained = lines[0].first.config.model.loops
    first, last = min(*loops, trained), max(*loops, trained)
    margin = 0.04 * (last - first) + 0.3
    axes.set_xlim(first - margin, last + margin)
    # Ticks where there are points, unless their labels would run into one another.
    if len(loops) < 2 or np.diff(loops).min() < 0.07 * (last - first):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    else:
        axes.set_xticks(loops)
    axes.set_xlabel("loops at inference")
    axes.axvline(trained, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    where = {"transform": axes.get_xaxis_transform(), "color": GREY, "fontsize": 7}
    axes.text(trained, 1.01, f"trained: {trained}", ha="center", va="bottom", **where)


def draw_training(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Loss over training steps, a line for each run, runs of one system in one style.

    Returns:
      None where no results file holds a training curve.
    """
    families = _run_families(evaluated)
    if not families:
        return None
    entries = [
        (_sample(i, marker=False), family.label + _times(len(family.results)))
        for i, family in families
    ]
    runs = [(i, results) for i, family in families for results in family.results]
    if any(results.training.validation_step for _, results in runs):
        sample = Line2D([], [], color=GREY, linestyle="none", **VALIDATION)
        entries.append((sample, "validation loss"))
    caption = f"{_origin([results for _, results in runs])}."
    figure, [axes] = _canvas(WIDE, 2.1, PAD, 1, entries, caption)
    for i, results in runs:
        _draw_curve(axes, results.training, i)
    _loss_axis(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("training (optimizer steps)")
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    return figure


def _loss_axis(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    lowest, highest = axes.get_ylim()
    # Within half a decade the steps 1, 2, 5 leave too few ticks.
    narrow = highest < 5 * lowest
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5) if narrow else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("loss (nats a token)")


def _run_families(evaluated: Sequence[Evaluated]) -> list[tuple[int, Evaluated]]:
    """Runs with a curve, each once, those of one system together; the index is of its style."""
    longest: dict[str, Results] = {}
    style: dict[str, int] = {}
    for i, line in enumerate(evaluated):
        for results in line.results:
            run = json.dumps(_run_key(results, with_seed=True), sort_keys=True)
            steps = results.training.step
            if steps and (run not in longest or steps[-1] > longest[run].training.step[-1]):
                longest[run] = results
                style.setdefault(run, i)
    families: dict[str, list[str]] = {}
    for run, results in longest.items():
        key = json.dumps(_run_key(results, with_seed=False), sort_keys=True)
        families.setdefault(key, []).append(run)
    named = _told_apart(
        [
            Evaluated(
                _system(longest[runs[0]]),
                _run_key(longest[runs[0]], with_seed=False),
                tuple(longest[run] for run in runs),
            )
            for runs in families.values()
        ]
    )
    return [(style[runs[0]], family) for runs, family in zip(families.values(), named, strict=True)]


VALIDATION = {"marker": "o", "markersize": 2.5, "markerfacecolor": "white", "markeredgewidth": 0.6}


def _draw_curve(axes: Axes, curve: Curve, index: int) -> None:
    style = _line_style(index)
    axes.plot(
        curve.step, curve.loss, color=style["color"], linestyle=style["linestyle"], linewidth=0.8
    )
    axes.plot(
        curve.validation_step,
        curve.validation_loss,
        color=style["color"],
        linestyle="none",
        zorder=3,
        **VALIDATION,
    )


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def _sample(index: int, marker: bool = True) -> Line2D:
    style = _line_style(index)
    return Line2D([], [], **(style if marker else {**style, "marker": ""}))


def _canvas(
    width: float,
    height: float,
    above: float,
    panels: int,
    entries: Sequence[LegendEntry],
    caption: str,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, the legend below them and a grey caption below that.

    Everything is measured in inches from the top, so that no text ever lies on another.

    Args:
      width: of the figure.
      height: of each panel's axes.
      above: room above each panel, for titles and notes.
      panels: how many, two in a row.
      entries: of the legend, in order.
      caption: any length; it is wrapped.
    """
    columns = min(panels, 2)
    rows = -(-panels // columns)
    characters = int((width - 2 * PAD) / 0.0435)
    text = "\n".join(_lines(caption, characters))
    labels = ["\n".join(_lines(label, 80 if width > SINGLE else 50)) for _, label in entries]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    legend_columns = max(1, min(len(labels), int((width + PAD) / (0.53 + 0.05 * widest))))
    deepest = max(label.count("\n") + 1 for label in labels)
    legend_height = -(-len(labels) // legend_columns) * deepest * LEGEND_LINE
    caption_height = (text.count("\n") + 1) * CAPTION_LINE
    top = above + PAD
    below = UNDER_AXES + legend_height + caption_height + 3 * PAD
    row_gap = UNDER_AXES + above
    total = top + rows * height + (rows - 1) * row_gap + below

    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    left = LEFT / width
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left,
        right=1 - RIGHT / width,
        bottom=below / total,
        top=1 - top / total,
        hspace=row_gap / height,
        wspace=0.3,
    )
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(panels)]
    figure.legend(
        [sample for sample, _ in entries],
        # A legend passes over labels that begin with an underscore.
        [f" {label}" if label.startswith("_") else label for label in labels],
        loc="upper left",
        bbox_to_anchor=(PAD / width, (below - UNDER_AXES) / total),
        ncols=legend_columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        labelspacing=0.35,
        handlelength=3,
        columnspacing=1.5,
    )
    figure.text(
        PAD / width, PAD / total, text, color=GREY, fontsize=6, va="bottom", linespacing=1.1
    )
    return figure, axes


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _provenance(evaluated: Sequence[Evaluated]) -> str:
    """Device, date, training seeds and number of problems."""
    results = [r for line in evaluated for r in line.results]
    return f"{_origin(results)}, {_problem_counts(results)}"


def _origin(results: Sequence[Results]) -> str:
    seeds = {r.config.train.seed for r in results}
    return (
        f"{_devices(results)}, {_dates(results)}, training"
        f" seed{'s' if len(seeds) > 1 else ''} {_ranges(seeds)}"
    )


def _devices(results: Sequence[Results]) -> str:
    return ", ".join(dict.fromkeys(r.device for r in results))


def _dates(results: Sequence[Results]) -> str:
    first, last = min(r.date for r in results), max(r.date for r in results)
    return f"{first}" if first == last else f"{first} to {last}"


def _problem_counts(results: Sequence[Results]) -> str:
    drawn = sorted({r.examples for r in results if not r.problems})
    own = sorted({(r.problems, r.examples) for r in results if r.problems})
    told = [f"{' or '.join(f'{n:,}' for n in drawn)} problems a length"] if drawn else []
    told += [f"{count:,} problems in {' '.join(name.split())}" for name, count in own]
    return ", ".join(told)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-4, 7` for 0, 1, 2, 3, 4, 7."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    told = []
    for _, run in runs:
        first, *others = [number for _, number in run]
        told.append(f"{first}-{others[-1]}" if others else f"{first}")
    return ", ".join(told)


def _times(seeds: int) -> str:
    return f", {seeds} seeds" if seeds > 1 else ""


def _seeds_told(estimates: Iterable[Estimate]) -> str:
    counts = {e.seeds for e in estimates}
    if len(counts) > 1:
        return f", {min(counts)} to {max(counts)} seeds"
    return _times(counts.pop())


def _interval_kind(evaluated: Sequence[Evaluated]) -> str:
    several = {len(line.results) > 1 for line in evaluated}
    wilson, student = "95% Wilson intervals", "95% Student intervals of the mean over seeds"
    if several == {True}:
        return student
    return f"{wilson}; where there are several seeds, {student}" if True in several else wilson


NOTE_ON_COLUMNS = (
    "The seed's columns go by the longer operand, and hold more than their names say: 5-6 really"
    " holds 5, 6 and 7 digits, 8 holds 8 and 9, 10 holds 10 and 11."
)
NOTE_ON_PUBLISHED = (
    "Published: the seed's own table, one training seed and 48 to 151 problems a column."
)


class TableRow(NamedTuple):
    """label, parameters; ours by seed column and by strict length, None where not scored.

    published: percent by seed column, None where the seed has no such system.
    """

    label: str
    parameters: int
    columns: list[Estimate | None]
    published: list[float | None]
    strict: dict[int, Estimate | None]


def table_rows(evaluated: Sequence[Evaluated]) -> list[TableRow]:
    """A row for each system; evaluations of the user's own problems have none."""
    rows = []
    for line in evaluated:
        first = line.first
        if first.problems:
            continue
        # The published table was scored without halting.
        key = (first.config.name, first.loops) if not first.halting else None
        seeds = _times(len(line.results))
        rows.append(
            TableRow(
                line.label + seeds,
                first.parameters,
                [line.in_column(column) for column in SEED_COLUMNS],
                list(PUBLISHED.get(key, (None,) * len(SEED_COLUMNS))),
                {n: line.at_length(n) for n in STRICT_LENGTHS},
            )
        )
    return rows


def _scored_strictly(rows: Sequence[TableRow]) -> list[int]:
    return [n for n in STRICT_LENGTHS if any(row.strict[n] for row in rows)]


def _notes(evaluated: Sequence[Evaluated]) -> list[str]:
    lines = [line for line in evaluated if not line.first.problems]
    results = [r for line in lines for r in line.results]
    commits = dict.fromkeys(_short_commit(r.commit) for r in results)
    seeds = _ranges(r.config.train.seed for r in results)
    examples = ", ".join(f"{n:,}" for n in sorted({r.examples for r in results}))
    return [
        f"Device: {_devices(results)}. Date: {_dates(results)}. Commit: {', '.join(commits)}."
        f" Training seeds: {seeds}. Problems per length: {examples}.",
        f"In brackets: {_interval_kind(lines)}.",
        NOTE_ON_COLUMNS,
        NOTE_ON_PUBLISHED,
    ]


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    name, plus, changes = commit.partition("+")
    return f"{name[:12]}{plus}{changes}"


def _value(found: Estimate | None) -> str:
    return "-" if found is None else f"{100 * found.mean:.2f}"


def _interval(found: Estimate | None) -> str:
    return "" if found is None else f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _percent(published: float | None) -> str:
    return "-" if published is None else f"{published:.2f}"


def markdown_table(evaluated: Sequence[Evaluated]) -> str:
    """The comparison with the seed's table in Markdown, aligned to be read as text.

    Accuracies are percent of whole answers right, with 95% intervals.
    """
    rows = table_rows(evaluated)
    ours = [["system", "parameters"]]
    ours[0] += [heading for column in SEED_COLUMNS for heading in (f"{column} digits", "published")]
    for row in rows:
        cells = [_markdown(row.label), f"{row.parameters:,}"]
        for found, published in zip(row.columns, row.published, strict=True):
            cells += [f"{_value(found)} {_interval(found)}".strip(), _percent(published)]
        ours.append(cells)
    parts = ["Whole answers right, percent, by the seed's columns.", _aligned(ours)]
    lengths = _scored_strictly(rows)
    if lengths:
        strict = [["system", *(f"{n} digits" for n in lengths)]]
        for row in rows:
            found = [row.strict[n] for n in lengths]
            cells = [f"{_value(f)} {_interval(f)}".strip() for f in found]
            strict.append([_markdown(row.label), *cells])
        parts += [
            "Whole answers right, percent, both operands exactly that long.",
            _aligned(strict),
        ]
    return "\n\n".join([*parts, *(_markdown(note) for note in _notes(evaluated))]) + "\n"


def _markdown(text: str) -> str:
    for special in ("\\", "|", "*", "_", "`", "<", "[", "]"):
        text = text.replace(special, "\\" + special)
    return text


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, numbers to the right."""
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(table[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [table[0], rule, *table[1:]]:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def latex_table(evaluated: Sequence[Evaluated]) -> str:
    """The same table for LaTeX with booktabs, over both columns of a page.

    Intervals stand in small print below their values.
    """
    rows = table_rows(evaluated)
    lengths = _scored_strictly(rows)
    last = 2 + 2 * len(SEED_COLUMNS)
    names = " & ".join(
        rf"\multicolumn{{2}}{{c}}{{{name.replace('-', '--')}}}" for name in SEED_COLUMNS
    )
    rules = "".join(rf"\cmidrule(lr){{{i}-{i + 1}}}" for i in range(3, last, 2))
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{lr{'rr' * len(SEED_COLUMNS)}}}",
        r"\toprule",
        rf" & & {names} \\",
        rules,
        rf"system & parameters{' & ours & seed' * len(SEED_COLUMNS)} \\",
        r"\midrule",
    ]
    for row in rows:
        pairs = list(zip(row.columns, row.published, strict=True))
        lines += [
            " & ".join(
                [_latex(row.label), f"{row.parameters:,}"]
                + [
                    _latex_number(cell)
                    for ours, seed in pairs
                    for cell in (_value(ours), _percent(seed))
                ]
            )
            + r" \\",
            " & & " + " & ".join(f"{_small(ours)} & " for ours, _ in pairs).rstrip() + r" \\",
        ]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if lengths:
        lines += [
            r"\par\medskip",
            rf"\begin{{tabular}}{{l{'r' * len(lengths)}}}",
            r"\toprule",
            " & ".join(["both operands exactly", *(f"{n} digits" for n in lengths)]) + r" \\",
            r"\midrule",
        ]
        for row in rows:
            found = [row.strict[n] for n in lengths]
            lines += [
                " & ".join([_latex(row.label), *(_latex_number(_value(f)) for f in found)])
                + r" \\",
                " & " + " & ".join(_small(f) for f in found) + r" \\",
            ]
        lines += [r"\bottomrule", r"\end{tabular}"]
    notes = _latex(" ".join(_notes(evaluated)))
    lines += [
        rf"\caption{{Whole answers right, percent. {notes}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _small(found: Estimate | None) -> str:
    return rf"{{\tiny {_interval(found)}}}" if found else ""


LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # A row that begins with a bracket would be read as an argument of the line break before it.
    "[": "{[}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{special: "\\" + special for special in "{}$&#%_"},
}


def _latex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in text)


def _latex_number(number: str) -> str:
    return "--" if number == "-" else number


def render(evaluated: Sequence[Evaluated]) -> dict[str, bytes]:
    """All files by name; the same bytes for the same systems.

    Figures that the results hold nothing for are left out, and so are the tables where there are
    only the user's own problems.
    """
    files = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        drawings = {
            "generalization": draw_generalization(evaluated),
            "test_time_loops": draw_test_time_loops(evaluated),
            "training": draw_training(evaluated),
        }
        for name, figure in drawings.items():
            if figure:
                files[f"{name}.png"] = _saved(figure, "png", {})
                files[f"{name}.pdf"] = _saved(figure, "pdf", {"CreationDate": None})
    if table_rows(evaluated):
        files["table.md"] = markdown_table(evaluated).encode()
        files["table.tex"] = latex_table(evaluated).encode()
    return files


def _saved(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=dict(metadata))
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.figures",
        description="Draw the figures and write the table that results files hold.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("figures"))
    arguments = parser.parse_args()
    files = [(path, read_results(path)) for path in arguments.results]
    evaluated, repeats = gather(files)
    rendered = render(evaluated)
    for sentence in repeats:
        console.print(sentence, markup=False)
    writable_folder(arguments.out)
    for name in rendered:
        if (arguments.out / name).is_dir():
            raise InputError(f"cannot write {arguments.out / name}: it is a folder")
    for name, content in rendered.items():
        _write(arguments.out / name, content)
        console.print(f"wrote {arguments.out / name}", markup=False)


def _write(path: Path, content: bytes) -> None:
    """Writes `content` whole or not at all, as `command_line.write_file` does with text."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    run_program(main)

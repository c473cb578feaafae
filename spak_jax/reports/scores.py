"""Scores as tables for people, on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spak_jax.command_line import Table, console
from spak_jax.evaluation.results import LengthScore, Results
from spak_jax.evaluation.statistics import OVER_SEEDS
from spak_jax.reports.grouping import Evaluated, ranges


def print_results(results: Results) -> None:
    """The zero-shot table."""
    loops = f", {results.loops_label} loops" if results.loops_label else ""
    seed = results.config.train.seed
    table = _table(
        f"{results.system}, training seed {seed}{loops}, step {results.step:,}", results.length_unit
    )
    parts = [("", results.lengths), ("published ", results.published_columns)]
    parts += [(f"{kind} ", scores) for kind, scores in results.kinds.items()]
    for prefix, scores in parts:
        if prefix and scores:
            table.add_section()
        for name, score in scores.items():
            _add_row(table, f"{prefix}{name}", score)
    console.print(table)
    if results.loops and not results.loops_per_symbol:
        warn_of_loops(results.config.model.model_dump(), results.loops)


def print_over_seeds(every: Sequence[Results]) -> None:
    """The same of runs that differ in their training seed: means over seeds and intervals."""
    first, line = every[0], Evaluated(every[0].system, tuple(every))
    numbers = ranges(results.config.train.seed for results in every)
    loops = f", {first.loops_label} loops" if first.loops_label else ""
    table = _table(f"{line.label}, mean over training seeds {numbers}{loops}", first.length_unit)
    for prefix, part, estimate, names in (
        ("", "lengths", line.at_length, line.lengths),
        ("published ", "published_columns", line.in_column, [*first.published_columns]),
    ):
        table.add_section()
        for name in names:
            scores = [getattr(results, part)[str(name)] for results in every]
            found = estimate(name)
            over_seeds = {
                "correct": sum(score.correct for score in scores),
                "total": sum(score.total for score in scores),
                "mean_loops": float(np.mean([score.mean_loops or 0 for score in scores])),
                "accuracy": found.mean,
                "low": found.low,
                "high": found.high,
            }
            _add_row(table, f"{prefix}{name}", scores[0].model_copy(update=over_seeds))
    console.print(table)
    console.print(f"Intervals: {OVER_SEEDS}.")


def warn_of_loops(architecture: Mapping[str, Any], loops: int) -> None:
    """Says so where a model runs more loops than it was trained for.

    architecture: the configuration's section `model`.
    """
    if loops > architecture["loops"] and not architecture.get("no_grad_warmup_loops"):
        console.print(
            f"note: {loops} loops, {architecture['loops']} in training: this model was not trained"
            " to be repeated (model.no_grad_warmup_loops = 0), and more loops can cost all answers"
        )


def _table(title: str, unit: str) -> Table:
    table = Table(title=f"{title}: whole answers right", title_justify="left")
    for heading in (unit, "", "right", "95% interval", "problems", "mean loops", "FLOP"):
        table.add_column(heading, justify="left" if not heading else "right")
    return table


def _add_row(table: Table, name: str, score: LengthScore) -> None:
    beyond = "zero-shot" if score.zero_shot else ""
    if 0 < (score.trained_share or 0) < 1:
        beyond = f"{score.trained_share:.1%} trained lengths"
    table.add_row(
        name,
        beyond,
        f"{score.accuracy:.1%}",
        f"{score.low:.1%} - {score.high:.1%}",
        f"{score.correct:,} / {score.total:,}",
        f"{score.mean_loops:.1f}" if score.mean_loops else "",
        f"{score.operations:.1e}" if score.operations else "",
    )

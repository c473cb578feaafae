"""The comparison with the baseline's published table, in Markdown and in LaTeX.

Accuracies are percent of whole answers right. Bounds of intervals are rounded outwards, so that
no interval reads as certainty.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spak_jax.baseline import COLUMN_LENGTHS, PUBLISHED
from spak_jax.evaluation.statistics import Estimate
from spak_jax.reports.grouping import (
    Evaluated,
    Tally,
    interval_kind,
    length_unit,
    origin,
    problem_counts,
    ranges,
    seed_note,
)

# Every input exactly that long. Of digits, which studies score at every length, these are shown
# where scored; of what else lengths count, all that were scored.
STRICT_LENGTHS = {"digits": (7, 8, 10, 12, 16, 32, 100, 1000, 10000)}

BY_COLUMN = "Whole answers right, percent, by the published columns."
BY_SYSTEM = "Systems."
BY_LENGTH = "Whole answers right, percent, every input exactly that long."
BY_KIND = "Wrong answers of all, over all lengths scored."
# Kinds of problems whose names do not say all.
NOTES_ON_KINDS = {
    "nines": "99...9 + 1",
    "all-carry": "every place carries",
    "no-carry": "none does",
    "lopsided": "one operand has at most 3 digits",
    "chains": "the lowest place carries and all others hand it on",
}
NOTE_ON_COLUMNS = (
    "The published columns go by the longer operand, and hold more than their names say: 5-6 really"
    " holds 5, 6 and 7 digits, 8 holds 8 and 9, 10 holds 10 and 11."
)
NOTE_ON_PUBLISHED = (
    "Published numbers are the baseline's own, from one training seed and 48 to 151 problems a"
    " column."
)

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
LATEX_START = [
    r"% Needs \usepackage{booktabs}.",
    r"\begin{table*}",
    r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
]


class Row(NamedTuple):
    """A system: label, number of parameters, operations of its training, accuracies.

    operations: of the longest of several seeds' trainings; None where the file does not say.
    columns: for each published column. published: the baseline's percent for each, all None where
    it has no such system. strict: by length. plain: wrong answers at all lengths. kinds: the same
    of problems of one kind, by kind. None where not scored.
    """

    label: str
    parameters: int
    operations: int | None
    columns: list[Estimate | None]
    published: Sequence[float | None]
    strict: dict[int, Estimate | None]
    plain: Tally
    kinds: dict[str, Tally | None]


def table_rows(evaluated: Sequence[Evaluated]) -> list[Row]:
    """A row for each system; evaluations of the user's own problems have none."""
    lines, columns = _listed(evaluated), _columns(evaluated)
    kinds = list(dict.fromkeys(kind for line in lines for kind in line.kinds))
    return [_row(line, columns, kinds) for line in lines]


def markdown_table(evaluated: Sequence[Evaluated]) -> str:
    """The tables by column and, if any was scored, by length and by kind, with notes.

    Also read as text.
    """
    rows, unit = table_rows(evaluated), length_unit(evaluated)
    columns = _columns(evaluated)
    # Files from before they were counted leave no column.
    counted = any(row.operations for row in rows)
    heading = ["System", "Parameters", *["Training FLOP"] * counted]
    heading += [name for column in columns for name in (f"{column} {unit}", "published")]
    table = [heading]
    for row in rows:
        cells = [_escaped(row.label), f"{row.parameters:,}", *[_operations(row)] * counted]
        for ours, published in zip(row.columns, row.published, strict=True):
            cells += [_combined(ours), _published(published)]
        table.append(cells)
    parts = [BY_COLUMN if columns else BY_SYSTEM, _aligned(table)]
    if lengths := _scored_lengths(rows):
        table = [["System", *(f"{n:,} {unit}" for n in lengths)]]
        table += [
            [_escaped(row.label), *(_combined(row.strict.get(n)) for n in lengths)] for row in rows
        ]
        parts += [BY_LENGTH, _aligned(table)]
    if kinds := list(rows[0].kinds):
        table = [["System", *map(_escaped, _kinds_heading(kinds))]]
        table += [[_escaped(row.label), *_kinds_cells(row)] for row in rows]
        parts += [BY_KIND, _aligned(table)]
    return "\n\n".join([*parts, *map(_escaped, _notes(evaluated))]) + "\n"


def latex_table(evaluated: Sequence[Evaluated]) -> str:
    """The same for LaTeX with booktabs, over both columns of a page.

    Intervals stand in small print below their values.
    """
    rows, unit = table_rows(evaluated), length_unit(evaluated)
    columns = _columns(evaluated)
    names = " & ".join(rf"\multicolumn{{2}}{{c}}{{{name.replace('-', '--')}}}" for name in columns)
    counted = any(row.operations for row in rows)
    first = 3 + counted
    rules = (rf"\cmidrule(lr){{{n}-{n + 1}}}" for n in range(first, first + 2 * len(columns), 2))
    heading = [rf" & {'& ' * counted}& {names} \\", "".join(rules)] if columns else []
    sizes = "parameters" + " & training FLOP" * counted
    heading += [rf"system & {sizes}{' & ours & published' * len(columns)} \\"]
    body = []
    for row in rows:
        cells = [_latex(row.label), f"{row.parameters:,}", *[_operations(row)] * counted]
        for ours, published in zip(row.columns, row.published, strict=True):
            cells += [_dashes(_mean(ours)), _dashes(_published(published))]
        small = [cell for ours in row.columns for cell in (_small(ours), "")]
        body.append(_latex_line(cells))
        if columns:
            body.append(_latex_line(["", "", *[""] * counted, *small]))
    lines = [*LATEX_START, *_tabular("lr" + "r" * counted + "rr" * len(columns), heading, body)]
    if lengths := _scored_lengths(rows):
        heading = [_latex_line(["every input exactly", *(f"{n:,} {unit}" for n in lengths)])]
        body = []
        for row in rows:
            found = [row.strict.get(n) for n in lengths]
            body.append(_latex_line([_latex(row.label), *(_dashes(_mean(f)) for f in found)]))
            body.append(_latex_line(["", *map(_small, found)]))
        lines += [r"\par\medskip", *_tabular("l" + "r" * len(lengths), heading, body)]
    if kinds := list(rows[0].kinds):
        heading = [_latex_line(["wrong answers of all", *map(_latex, _kinds_heading(kinds))])]
        body = [_latex_line([_latex(r.label), *map(_dashes, _kinds_cells(r))]) for r in rows]
        lines += [r"\par\medskip", *_tabular("l" + "r" * (len(kinds) + 2), heading, body)]
    notes = _latex(" ".join(_notes(evaluated)))
    lines += [rf"\caption{{Whole answers right, percent. {notes}}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _listed(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    return [line for line in evaluated if not line.first.problems]


def _columns(evaluated: Sequence[Evaluated]) -> tuple[str, ...]:
    """The published columns, where anything was scored by them."""
    scored = any(r.published_columns for line in _listed(evaluated) for r in line.results)
    return tuple(COLUMN_LENGTHS) if scored else ()


def _row(line: Evaluated, columns: Sequence[str], kinds: Sequence[str]) -> Row:
    first = line.first
    # The published table was scored without halting, at the end of training.
    published = not (first.halting or first.on_the_way)
    key = (first.config.name, first.loops) if published else None
    return Row(
        line.label + seed_note([len(line.results)]),
        first.parameters,
        max((r.training_operations or 0 for r in line.results), default=0) or None,
        [line.in_column(column) for column in columns],
        PUBLISHED.get(key, [None] * len(columns)) if columns else [],
        {n: line.at_length(n) for n in STRICT_LENGTHS.get(line.first.length_unit, line.lengths)},
        line.tally(),
        {kind: line.tally(kind) for kind in kinds},
    )


def _scored_lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({n for row in rows for n, found in row.strict.items() if found})


def _kinds_heading(kinds: Iterable[str]) -> list[str]:
    return ["uniform", *kinds, "lengths"]


def _kinds_cells(row: Row) -> list[str]:
    """Wrong answers of all; a kind scored at other lengths than the plain ones says at which."""
    cells = []
    for found in (row.plain, *row.kinds.values()):
        cell = "-" if found is None else f"{found.wrong:,} / {found.total:,}"
        if found and found.lengths != row.plain.lengths:
            cell += f" ({ranges(found.lengths)})"
        cells.append(cell)
    return [*cells, ranges(row.plain.lengths)]


def _notes(evaluated: Sequence[Evaluated]) -> list[str]:
    lines, columns = _listed(evaluated), _columns(evaluated)
    results = [r for line in lines for r in line.results]
    seeds = {line.label: ranges(r.config.train.seed for r in line.results) for line in lines}
    # Where they are not the same for all.
    by_label = "; ".join(f"{label} {of}" for label, of in seeds.items())
    of_each = f" Training seeds: {by_label}." if len(set(seeds.values())) > 1 else ""
    shares = {
        name: {
            r.published_columns[name].trained_share for r in results if name in r.published_columns
        }
        for name in columns
    }
    commits = ", ".join(dict.fromkeys(_short_commit(r.commit) for r in results))
    return [
        f"{origin(results)}, {problem_counts(results)}, commit {commits}.{of_each}",
        f"In parentheses: {interval_kind(lines)}, bounds rounded outwards.",
        *_notes_on_kinds(lines),
        *([NOTE_ON_COLUMNS + _note_on_shares(shares), NOTE_ON_PUBLISHED] * bool(columns)),
    ]


def _notes_on_kinds(lines: Sequence[Evaluated]) -> list[str]:
    there = {kind for line in lines for kind in line.kinds}
    notes = [f"{kind}: {words}" for kind, words in NOTES_ON_KINDS.items() if kind in there]
    return [f"{'; '.join(notes)}."] * bool(notes)


def _note_on_shares(shares: dict[str, set[float | None]]) -> str:
    """What the columns hold of trained lengths and of longer ones; older files do not say."""
    shown = []
    for name, of_column in shares.items():
        known = sorted(x for x in of_column if x is not None and 0 < x < 1)
        if known:
            low, high = (f"{100 * x:.1f}" for x in (known[0], known[-1]))
            shown.append(f"{name} {low if low == high else f'{low} to {high}'}%")
    return f" Of a column's problems, of trained lengths: {', '.join(shown)}." if shown else ""


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    name, plus, changes = commit.partition("+")
    return f"{name[:12]}{plus}{changes}"


def _operations(row: Row) -> str:
    return "-" if row.operations is None else f"{row.operations:.1e}"


def _mean(found: Estimate | None) -> str:
    return "-" if found is None else f"{100 * found.mean:.1f}"


def _interval(found: Estimate) -> str:
    # To six digits first: 0.653 * 1000 is a hair over 653.
    low = math.floor(round(1000 * found.low, 6)) / 10
    high = math.ceil(round(1000 * found.high, 6)) / 10
    return f"({low:.1f}-{high:.1f})"


def _combined(found: Estimate | None) -> str:
    return "-" if found is None else f"{_mean(found)} {_interval(found)}"


def _published(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def _escaped(text: str) -> str:
    """Plain text for Markdown."""
    return "".join("\\" + c if c in "\\|*_`<[]" else c for c in text)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in [table[0], rule, *table[1:]]:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tabular(columns: str, heading: Iterable[str], body: Iterable[str]) -> list[str]:
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *heading,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(LATEX_SPECIALS.get(character, character) for character in text)


def _dashes(number: str) -> str:
    return number.replace("-", "--")


def _small(found: Estimate | None) -> str:
    return rf"{{\tiny {_dashes(_interval(found))}}}" if found else ""

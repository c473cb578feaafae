"""What people read: a console that takes no text for markup, and tables that cut nothing."""

import copy
import os
import shutil
from collections.abc import Iterator

import rich.console
import rich.table
from rich.cells import cell_len
from rich.text import Text

# Off a terminal rich would wrap tables at 80 columns; a log or a pipe wants them whole.
OFF_TERMINAL = 140


class Console(rich.console.Console):
    """A console for any text: nothing in it is markup, and no terminal is needed."""

    def __init__(self):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True)

    @property
    def encoding(self) -> str:
        """Of the stream that is written to now; rich asks for that of one given at first."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        """That which COLUMNS says, else the terminal's; many columns where there is none."""
        width, height = super().size
        columns = os.environ.get("COLUMNS", "")
        if columns.isdecimal() and int(columns):
            width = int(columns)
        elif not self.is_terminal:
            width = OFF_TERMINAL
        elif width < 1:
            # rich takes COLUMNS=0 at its word.
            width = shutil.get_terminal_size().columns
        return rich.console.ConsoleDimensions(width, height)


console = Console()


class Table(rich.table.Table):
    """A table that loses nothing where it is narrow: cells are wrapped between words, and where not
    even each column's longest word has room, every row is a list of lines `heading: cell`.

    Cells and headings are text.
    """

    def add_row(self, *cells: str, **style) -> None:
        # Spaces at a line's start would have rich break the word behind them.
        lines = [[line.strip() for line in cell.splitlines()] for cell in cells]
        super().add_row(*map("\n".join, lines), **style)

    def __rich_console__(self, console, options):
        fitted = self._fitted(console, options)
        if fitted is None:
            yield Text("\n".join(self._lines(options.max_width)))
        else:
            yield from rich.table.Table.__rich_console__(fitted, console, options)

    def _fitted(self, console, options) -> "Table | None":
        """The table with widths for its columns that split no word; None where there are none."""
        unbounded = options.update(width=10**6)
        ranges = [self._measure_column(console, unbounded, column) for column in self.columns]
        spare = options.max_width - self._extra_width - sum(each.minimum for each in ranges)
        if spare < 0:
            return None
        wanted = sum(each.span for each in ranges)
        share = min(1.0, spare / wanted) if wanted else 0.0
        fitted = copy.copy(self)
        fitted.columns = [copy.copy(column) for column in self.columns]
        for column, each in zip(fitted.columns, ranges, strict=True):
            # rich adds the padding.
            padding = self._get_padding_width(column._index)
            column.width = each.minimum + int(share * each.span) - padding
            # rich counts wide characters wrongly, and cuts off more than spaces otherwise.
            column.overflow = "fold"
        return fitted

    def _lines(self, width: int) -> Iterator[str]:
        if self.title:
            yield from _wrapped(str(self.title), width)
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield ""
            for column, cell in zip(self.columns, row, strict=True):
                start = f"{column.header}: " if column.header else ""
                for line in str(cell).splitlines():
                    yield from _wrapped(start + line, width)
                    start = "  "


def _wrapped(text: str, width: int) -> Iterator[str]:
    """A line as several of so many columns; a word that is longer stays whole."""
    words = text.split()
    line = text[: len(text) - len(text.lstrip())] + "".join(words[:1])
    for word in words[1:]:
        if cell_len(f"{line} {word}") > width:
            yield line
            line = f"  {word}"
        else:
            line = f"{line} {word}"
    yield line

"""Tables as plain data: built once, rendered on a terminal, in a model card and on a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from rich import table as rich_table


@dataclass(frozen=True)
class Whisker:
    """A difference from zero with two standard errors on both sides.

    Attributes:
        place: percent from the left; zero is at 50.
        ends: of the line, in the same percentages; None if the error is not known.
        is_noise: True if the difference is within two standard errors of zero.
    """

    place: float
    ends: tuple[float, float] | None
    is_noise: bool


@dataclass(frozen=True)
class Cell:
    """The text of a cell.

    Attributes:
        error: the standard error or the range of the number, or another remark on it.
        detail: the subject of the text: a dataset, a range.
        drawing: shown only on a page.
        is_noise: True for a change within two standard errors of zero.
    """

    text: str = ""
    error: str = ""
    detail: str = ""
    drawing: Whisker | None = None
    is_noise: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.text, self.detail, self.error)))


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its lines, separated by line breaks.
        is_number: True to align to the right.
        style: on a page: `change` or `bar`.
        needs_width: True to show the column only on a page.
    """

    title: str
    is_number: bool = True
    style: str = ""
    needs_width: bool = False


BARS = Column("", is_number=False, style="bar", needs_width=True)
Cells = Sequence[str | Cell]


@dataclass(frozen=True)
class Table:
    """Columns of text; the first column names the rows.

    Attributes:
        name: identifies it on a page.
        caption: how the numbers were measured; one line each.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Cells]
    caption: Sequence[str] = ()

    def merged(self) -> Table:
        """The table with one row for every stretch of rows that differ only in their names: `3–7`."""
        rows = []
        for cells, stretch in groupby(self.rows, lambda row: row[1:]):
            first, *rest = (str(row[0]) for row in stretch)
            rows.append(["–".join([first, *rest[-1:]]), *cells])
        return replace(self, rows=rows)

    def markdown(self, shown: Callable[[str], str] = str) -> str:
        """The table in Markdown, without its title and its caption.

        Args:
            shown: escapes a text.
        """
        columns = self._narrow()
        titles = [self.columns[column].title.replace("\n", ", ") for column in columns]
        lines = [titles, *([str(row[column]) for column in columns] for row in self.rows)]
        head, *body = (f"| {' | '.join(map(shown, cells))} |" for cells in lines)
        return "\n".join([head, "|---" * len(columns) + "|", *body])

    def __rich__(self) -> rich_table.Table:
        caption = "\n".join(self.caption) or None
        shown = rich_table.Table(title=self.title or None, caption=caption, caption_justify="left")
        columns = self._narrow()
        for place in columns:
            column = self.columns[place]
            justify: Literal["left", "right"] = "right" if column.is_number else "left"
            # Names of datasets are long: their part is on a separate line.
            title = column.title.replace("@", "\n@")
            shown.add_column(title, justify=justify, overflow="fold")
        for row in self.rows:
            shown.add_row(*(str(row[place]) for place in columns))
        return shown

    def _narrow(self) -> list[int]:
        """The places of the columns that are not only for a page."""
        return [place for place, column in enumerate(self.columns) if not column.needs_width]


def whiskers(differences: Iterable[tuple[float, float | None] | None]) -> list[Cell]:
    """The cells of a column that draws differences with their standard errors, all to one scale."""
    drawn = list(differences)
    reach = max((abs(value) + 2 * (error or 0.0) for value, error in filter(None, drawn)), default=0.0)
    scale = 48 / reach if reach else 0.0
    return [Cell(drawing=_whisker(*difference, scale)) if difference else Cell() for difference in drawn]


def _whisker(value: float, error: float | None, scale: float) -> Whisker:
    if error is None:
        return Whisker(round(50 + scale * value, 2), None, is_noise=False)
    ends = max(1.0, 50 + scale * (value - 2 * error)), min(99.0, 50 + scale * (value + 2 * error))
    return Whisker(round(50 + scale * value, 2), (round(ends[0], 2), round(ends[1], 2)), abs(value) < 2 * error)

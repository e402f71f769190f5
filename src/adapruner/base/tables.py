"""Tables as plain data: built once, rendered on a terminal, in a model card and on a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from rich import table as rich_table


@dataclass(frozen=True)
class Cell:
    """The text of a cell.

    Attributes:
        error: the standard error or the range of the number, or another remark on it.
        detail: the subject of the text: a dataset, a range.
        is_noise: True for a change within two standard errors of zero.
    """

    text: str = ""
    error: str = ""
    detail: str = ""
    is_noise: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.text, self.detail, self.error)))


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its lines, separated by line breaks.
        is_number: True to align to the right.
        style: on a page: `change` or `written`.
    """

    title: str
    is_number: bool = True
    style: str = ""


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
        titles = [column.title.replace("\n", ", ") for column in self.columns]
        head, *body = (f"| {' | '.join(map(shown, map(str, cells)))} |" for cells in (titles, *self.rows))
        return "\n".join([head, "|---" * len(titles) + "|", *body])

    def __rich__(self) -> rich_table.Table:
        caption = "\n".join(self.caption) or None
        shown = rich_table.Table(title=self.title or None, caption=caption, caption_justify="left")
        for column in self.columns:
            justify: Literal["left", "right"] = "right" if column.is_number else "left"
            # Names of datasets are long: their part is on a separate line.
            title = column.title.replace("@", "\n@")
            shown.add_column(title, justify=justify, overflow="fold")
        for row in self.rows:
            shown.add_row(*map(str, row))
        return shown

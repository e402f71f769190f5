"""The tables of `results.md`, made from the files in `results/`.

`python research/tables.py` writes them; with `--check`, it fails if one differs from its file or is not shown.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

HERE = Path(__file__).parent
TEXTS = ("boolq", "wikitext2", "ptb")
PLACE = re.compile(r"(<!--(?P<file>[\w-]+)/(?P<table>[\w-]+)-->\n).*?(<!--end-->)", re.DOTALL)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Measured(Strict):
    """The circumstances of a measurement; "not recorded" stands where one is unknown.

    Attributes:
        recorded: first commit of this repository that has the numbers, with its date.
        script: script of the repository that repeats the measurement, or "by hand".
    """

    model: str
    checkpoint_sha256: str
    commit: str
    recorded: str
    versions: dict[str, str]
    machine: str
    windows: str
    seeds: str
    script: str

    def markdown(self, file: str) -> str:
        return (
            f"*`{file}.json`: {self.model}; {self.windows}; seeds: {self.seeds}; machine {self.machine}; "
            f"{self.script}; commit {self.commit}, numbers since {self.recorded}.*\n"
        )


class Column(Strict):
    """A column of a table.

    Attributes:
        digits: decimal places of its numbers; as in the file if none.
    """

    key: str
    title: str
    digits: int | None = None


class Table(Strict):
    """Rows hold cells by the key of their column. Cells without a column are kept in the file alone."""

    columns: list[Column]
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        cells = [[cell(row.get(column.key), column.digits) for column in self.columns] for row in self.rows]
        titles, *lines = (f"| {' | '.join(line)} |\n" for line in [[column.title for column in self.columns], *cells])
        return "".join([titles, "|", "---|" * len(self.columns), "\n", *lines])


class Results(Strict):
    """A file in `results/`."""

    question: str
    measured: Measured
    tables: dict[str, Table]

    def markdown(self, file: str, table: str) -> str:
        if table == "measured":
            return self.measured.markdown(file)
        shown = self.tables[table]
        if table == "behind":
            shown = Table(columns=shown.columns, rows=[*losses(self.tables["one-shot"].rows), *shown.rows])
        return shown.markdown()


def losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table "behind": untrained peers that are ahead of ours on a text, and peers that are faster.

    Args:
        rows: of the table "one-shot": times dense on the texts, and processor seconds, of every method.
    """
    quality, time = [], []
    for case in dict.fromkeys((row["model"], row["blocks"]) for row in rows):
        own = [row for row in rows if (row["model"], row["blocks"]) == case and "uniform" not in row["method"]]
        ours = [row for row in own if "AdaPruner" in row["method"]]
        peers = [row for row in own if row not in ours and "trained" not in row["method"]]
        model, blocks = case
        for one in ours:
            name = re.sub(r"\*|AdaPruner, | \((two seeds|trained)\)", "", one["method"])
            for peer in peers:
                nats = [math.log(one[text] / peer[text]) for text in TEXTS]
                if max(nats) > 0:
                    mean, *each = (f"{value:.2f}".replace("-0.00", "0.00") for value in (sum(nats) / len(nats), *nats))
                    by = f"{mean} nats ({' / '.join(each)})".replace("-", "−")
                    quality.append({"model": model, "blocks": blocks, "ours": name, "ahead": peer["method"], "by": by})
        quick, faster = ours[0], sorted(peers, key=lambda peer: int(peer["seconds"]))
        faster = [peer for peer in faster if peer["seconds"] < quick["seconds"]]
        names, seconds = (", ".join(str(peer[key]) for peer in faster) for key in ("method", "seconds"))
        by = f"{quick['seconds']} s, theirs {seconds} s"
        time.append({"model": model, "blocks": blocks, "ours": "`quick`", "ahead": names, "by": by})
    return quality + time


def cell(value: Any, digits: int | None) -> str:
    """A cell: text, a number, one number for each dataset, or the mean and range of several measurements."""
    match value:
        case None:
            return ""
        case str():
            return value
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,}" if digits is None else f"{value:,.{0 if value >= 100 else digits}f}"
        case list():
            return " / ".join(cell(number, digits) for number in value)
        case {"mean": mean, "least": least, "greatest": greatest}:
            return f"{cell(mean, digits)} ({cell(least, digits)}–{cell(greatest, digits)})"
    raise TypeError(f"a table has no cells like {value!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not that of its file")
    check = parser.parse_args().check
    page = HERE / "results.md"
    results = {file.stem: Results.model_validate_json(file.read_bytes()) for file in HERE.glob("results/*.json")}
    before = page.read_text(encoding="utf-8")
    after = PLACE.sub(
        lambda place: place[1] + results[place["file"]].markdown(place["file"], place["table"]) + place[4], before
    )
    shown = {(place["file"], place["table"]) for place in PLACE.finditer(before)}
    missing = {(file, table) for file in results for table in ("measured", *results[file].tables)} - shown
    if missing:
        sys.exit(f"results.md does not show {sorted(missing)}")
    if check and before != after:
        sys.exit("results.md is not what its files say: run python research/tables.py")
    if not check:
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a run prints on a terminal, as a picture: stages and the first table, from the result of a finished run.

python docs/recording.py runs/demo    # writes docs/images/first-run.svg
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from cyclopts import run as run_script
from rich.console import CONSOLE_SVG_FORMAT
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.terminal_theme import MONOKAI

from adapruner.base.progress import PlainConsole
from adapruner.report.result import RunResult, summary_of

PICTURE = Path(__file__).parent / "images" / "first-run.svg"
# Without the font that rich takes from the web: a picture in a page may load nothing.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def draw(result: RunResult, command: str) -> str:
    console = PlainConsole(record=True, width=88, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"$ {command}")
    bars = Table.grid(padding=(0, 1))
    for stage, cost in result.stages.items():
        if cost.seconds >= 1:
            minutes, seconds = divmod(round(cost.seconds), 60)
            bars.add_row(stage, ProgressBar(1, 1, width=56), f"{minutes}:{seconds:02}")
    console.print(bars)
    title = f"{result.config.model}: {result.removed_share:.1%} of all parameters removed"
    console.print(summary_of(title, result.models))
    return console.export_svg(title="adapruner", theme=MONOKAI, code_format=FORMAT, unique_id="run")


def main(run: Path, /) -> None:
    """Draws the picture."""
    result = RunResult.model_validate_json((run / "result.json").read_bytes())
    PICTURE.write_text(draw(result, "make demo"), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)

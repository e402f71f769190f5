"""Which families can be pruned, and how: of every decoder of the installed transformers that builds tiny, a model is
saved, and `adapruner inspect` asked about the folder. Writes the table in docs/families.md.

    python tests/family_table.py
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from adapruner.cli import main as adapruner
from adapruner.families.tiny import random_model
from adapruner.models import known_architectures
from tiny_families import OTHERS, decoder_families, tiny_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"
COLUMNS = ("family", "from", "heads", "channels", "experts", "channels in experts", "whole", "layouts")


def inspect(folder: str, *options: str) -> tuple[int, str]:
    """The exit code of `adapruner inspect FOLDER --json`, and what it prints: JSON, or with code 2 the refusal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            adapruner(["inspect", folder, *options, "--json"])
        except SystemExit as ended:
            code = int(ended.code or 0)
            return code, err.getvalue() if code else out.getvalue()
    raise AssertionError("the command did not exit")


def row(model_type: str) -> tuple[str, bool]:
    """A line of the table, and whether the family can be pruned."""
    config = tiny_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            random_model(config).save_pretrained(folder)
        except RuntimeError:  # builds on the meta device alone; `inspect` reads the config and says why
            config.save_pretrained(folder)
        code, answer = inspect(folder)
        if code:
            assert code == 2, answer
            reason = " ".join(answer.removeprefix("adapruner: ").replace(folder, "").split()).replace("|", "/")
            short = f"{reason[:200]}…" if len(reason) > 200 else reason
            return f"| `{model_type}` | refused: {short}{' |' * (len(COLUMNS) - 1)}", False
        blocks = json.loads(answer)["blocks"]
        architecture: dict[str, Any] = json.loads(inspect(folder, "--architecture")[1])
    cells = [f"`{model_type}`", "file" if model_type in known_architectures() else "inferred"]
    for kind in ("heads", "channels", "experts"):
        layers = len({block["layer"] for block in blocks if block["kind"] == kind})
        cells.append("" if not layers else "yes" if layers == config.num_hidden_layers else "some layers")
    cells.append("yes" if "channels" in architecture.get("experts", {}) else "")
    cells.append(", ".join(architecture.get("whole", ("attention", "feed-forward", "layer"))))
    cells.append(", ".join(architecture.get("layouts", ("per-layer", "uniform"))))
    return f"| {' | '.join(cells)} |", True


def quiet() -> None:
    """One thread for each process, and no warnings of what is tried."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def main() -> None:
    families, rows, pruned = decoder_families(), [], 0
    started = time.monotonic()
    with ProcessPoolExecutor(initializer=quiet, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line, is_pruned in pool.map(row, families):
            rows.append(line)
            pruned += is_pruned
            print(f"{time.monotonic() - started:.0f} s {line}", file=sys.stderr, flush=True)
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    count = (
        f"transformers {transformers.__version__}: {pruned} of {len(families)} families can be pruned"
        f" ({len(OTHERS)} encoders, state-space models and parts of other models were not tried).\n\n"
    )
    heading = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    table = "\n".join(rows) + "\n"
    DOCUMENT.write_text(before + START + count + heading + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

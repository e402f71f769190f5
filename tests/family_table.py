"""Which families can be pruned, and how: of every decoder of the installed transformers that builds tiny, a model is
saved, and inspected as `adapruner inspect` does. Writes the table in docs/reference/families.md.

    python tests/family_table.py
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from adapruner import AdaPrunerError, verbs
from adapruner.families.tiny import random_model
from adapruner.models import known_architectures
from tiny_families import OTHERS, decoder_families, tiny_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"
COLUMNS = ("family", "from", "heads", "channels", "experts", "channels in experts", "whole", "layouts")


def row(model_type: str) -> tuple[str, bool]:
    """A line of the table, and whether the family can be pruned."""
    config = tiny_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            random_model(config).save_pretrained(folder)
        except RuntimeError:  # builds on the meta device alone; `inspect` reads the config and says why
            config.save_pretrained(folder)
        try:
            structure, architecture = verbs.inspect(folder), verbs.describe(folder)
        except AdaPrunerError as refusal:
            reason = " ".join(str(refusal).replace(folder, "").split()).replace("|", "/")
            short = f"{reason[:200]}…" if len(reason) > 200 else reason
            return f"| `{model_type}` | refused: {short}{' |' * (len(COLUMNS) - 1)}", False
    cells = [f"`{model_type}`", "file" if model_type in known_architectures() else "inferred"]
    for kind in ("heads", "channels", "experts"):
        layers = len({block.layer for block in structure.blocks if block.kind == kind})
        cells.append("" if not layers else "yes" if layers == config.num_hidden_layers else "some layers")
    cells.append("yes" if architecture.experts and architecture.experts.channels else "")
    cells += [", ".join(architecture.whole), ", ".join(architecture.layouts)]
    return f"| {' | '.join(cells)} |", True


def quiet() -> None:
    """One thread for each process, and neither warnings nor progress."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapruner").setLevel(logging.WARNING)


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

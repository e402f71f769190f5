"""Which families can be pruned, and how: every decoder of the installed transformers that builds tiny is inferred and
proven, and the table in docs/families.md written.

    python tests/family_table.py
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import transformers

from adapruner.conformance import prove
from adapruner.errors import AdaPrunerError
from adapruner.models import empty_model, infer_architecture, known_architectures, using_architecture
from adapruner.structure import Kind, build_structure
from tiny_families import OTHERS, decoder_families, tiny_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- table -->\n", "<!-- end -->\n"
KINDS: tuple[Kind, ...] = ("heads", "channels", "experts")


def row(model_type: str) -> tuple[str, bool]:
    """A line of the table, and whether the family can be pruned."""
    config, shipped = tiny_config(model_type), known_architectures().get(model_type)
    try:
        architecture = shipped or prove(config, infer_architecture(config))
    except AdaPrunerError as refusal:
        reason = " ".join(str(refusal).split()).replace("|", "/")
        return f"| `{model_type}` | refused: {reason[:200]}{'…' if len(reason) > 200 else ''} | | | | | |", False
    with using_architecture(architecture):
        blocks = build_structure(empty_model(config)).blocks
    cells = [f"`{model_type}`", "file" if shipped else "inferred"]
    for kind in KINDS:
        layers = len({block.layer for block in blocks if block.kind == kind})
        cells.append("" if not layers else "yes" if layers == config.num_hidden_layers else "some layers")
    cells.append("yes" if architecture.experts and architecture.experts.channels else "")
    cells.append(", ".join(architecture.layouts))
    return f"| {' | '.join(cells)} |", True


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    families, rows, pruned = decoder_families(), [], 0
    for model_type in families:
        started = time.monotonic()
        line, is_pruned = row(model_type)
        rows.append(line)
        pruned += is_pruned
        print(f"{line} {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    count = (
        f"transformers {transformers.__version__}: {pruned} of {len(families)} families can be pruned"
        f" ({len(OTHERS)} encoders, state-space models and parts of other models were not tried).\n\n"
    )
    heading = "| family | from | heads | channels | experts | channels in experts | layouts |\n|---|---|---|---|---|---|---|\n"
    table = "\n".join(rows) + "\n"
    DOCUMENT.write_text(before + START + count + heading + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

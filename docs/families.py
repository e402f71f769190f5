"""Which families can be pruned, and how: of every decoder of the installed transformers that builds tiny, a model is
saved, and inspected as `adapruner inspect` does; of every multimodal family, a model is also pruned, saved, loaded and
given text and an image. Writes the tables in docs/reference/families.md.

    python docs/families.py
"""

from __future__ import annotations

import copy
import inspect
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import adapruner
from adapruner import AdaPrunerError
from adapruner.base.errors import reason
from adapruner.checkpoint import write_model
from adapruner.families import open_config
from adapruner.families.inference import random_model
from adapruner.model.architecture import architecture_of
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.model.wrapper import wrapper_of
from adapruner.options import Layout
from adapruner.run.steps import describe
from adapruner.structure.blocks import Kind, Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from tiny_families import OTHERS, decoder_families, random_plan, tiny_config
from tiny_images import masked_logits, with_image
from tiny_wrappers import tiny_wrapper

DOCUMENT = Path(__file__).parent / "reference" / "families.md"
COLUMNS = ("heads", "channels", "experts", "channels in experts", "whole attention", "layouts")
MULTIMODAL_COLUMNS = ("heads", "channels", "experts", "whole attention", "layouts", "image")
# Largest distance of the pruned from the masked logits, relative to the change by masking; and the smallest change,
# relative to the logits.
TOLERANCE, LEAST_EFFECT = 1e-3, 1e-2


class Row(NamedTuple):
    """What was found out about a family.

    Attributes:
        cells: what can be pruned, by column; empty if nothing can.
        refusal: why nothing can be pruned.
        pictured: the pruned model was compared with the masked one, with an image.
    """

    family: str
    cells: tuple[str, ...] = ()
    refusal: str = ""
    pictured: bool = False


def multimodal_row(model_type: str) -> Row:
    """A multimodal family."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            dense = tiny_wrapper(model_type)
        except Exception as error:  # anything that a class raises over sizes for which it was not made
            return Row(model_type, refusal=f"not tried, because no small one can be built: {reason(error)}")
        dense.save_pretrained(folder)
        try:
            location = find_model(folder)
            architecture = architecture_of(open_config(location))
            decoder = load_model(location)
            structure = build_structure(decoder)
            inputs, image = image_inputs(dense)
            for layout in architecture.layouts:
                prune_and_load(decoder, structure, layout, Path(folder, layout), dense, inputs)
        except (AdaPrunerError, AssertionError) as error:
            return Row(model_type, refusal=str(error).replace(f" '{folder}'", ""))
    cells = [*kinds_of(structure), "yes" if structure.attention_parameters else ""]
    return Row(model_type, (*cells, ", ".join(architecture.layouts), image), pictured=inputs is not None)


def image_inputs(dense: PreTrainedModel) -> tuple[dict[str, Tensor] | None, str]:
    """Inputs with an image, if the model can be run with them, and the cell about it."""
    if not any("pixel_values" in name for name in inspect.signature(dense.forward).parameters):
        return None, "reads none"
    try:
        return with_image(dense), "yes"
    except ValueError:
        return None, "not tried"


def prune_and_load(
    decoder: PreTrainedModel,
    structure: Structure,
    layout: Layout,
    folder: Path,
    dense: PreTrainedModel,
    inputs: dict[str, Tensor] | None,
) -> None:
    """Prunes in a layout, saves, and compares the model that the multimodal class loads with the dense model whose
    decoder does not read the removed groups: for text, and for a prompt with an image."""
    counts = [max(block.least, block.groups // 2, 1) for block in structure.blocks]
    if layout == "per-layer":
        counts = [
            max(count, block.groups - 1 - block.layer % 2)
            for count, block in zip(counts, structure.blocks, strict=True)
        ]
    plan = random_plan(structure, counts)
    write_model(prune_model(decoder, structure, plan), folder, "2GB")
    # A few families are text models to transformers too.
    auto_class = AutoModelForMultimodalLM if wrapper_of(decoder) else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(3, 150, (2, 12), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for name, arguments in (("text", text), ("an image", inputs)):
        if arguments is None:
            continue
        with torch.no_grad():
            before, logits = dense(**arguments).logits, model(**arguments).logits
        expected = masked_logits(decoder, structure, plan, copy.deepcopy(dense), arguments)
        effect, difference = (before - expected).norm(), (logits - expected).norm()
        assert effect > LEAST_EFFECT * before.norm(), f"with {name}, the removed groups had no effect"
        assert difference <= TOLERANCE * effect, f"with {name}, the loaded model differs by {difference / effect:.2g}"


def short(why: str, family: str) -> str:
    """A refusal without its details and the name of the family; stderr has all of it."""
    line = re.sub(rf"{re.escape(family)}\w*", "…", " ".join(why.split())).replace("|", "/")
    return re.split(r": | \(|;", line)[0]


def kinds_of(structure: Structure) -> list[str]:
    """The layers in which each kind of groups can be removed."""
    layers = [{block.layer for block in structure.blocks if block.kind == kind} for kind in get_args(Kind)]
    return ["" if not found else "yes" if len(found) == structure.layers else "some layers" for found in layers]


def row(model_type: str) -> Row:
    """A family of text models."""
    config = tiny_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            random_model(config).save_pretrained(folder)
        except RuntimeError:  # builds on the meta device alone; `inspect` reads the config and says why
            config.save_pretrained(folder)
        try:
            structure, architecture = adapruner.inspect(folder), describe(folder)
        except AdaPrunerError as refusal:
            return Row(model_type, refusal=str(refusal))
    in_experts = "yes" if architecture.experts and architecture.experts.channels else ""
    cells = (
        *kinds_of(structure),
        in_experts,
        "yes" * architecture.removable_attention,
        ", ".join(architecture.layouts),
    )
    return Row(model_type, cells)


def quiet() -> None:
    """One thread for each process, and neither warnings nor progress."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapruner").setLevel(logging.WARNING)


def main() -> None:
    others = f" ({len(OTHERS)} encoders, state-space models and parts of other models were not tried)"
    write_table("table", row, decoder_families(), COLUMNS, others)
    write_table("multimodal", multimodal_row, sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES), MULTIMODAL_COLUMNS)


def write_table(
    name: str, make: Callable[[str], Row], families: Sequence[str], columns: tuple[str, ...], others: str = ""
) -> None:
    """Writes a table between its marks in the document."""
    rows, started = list[Row](), time.monotonic()
    with ProcessPoolExecutor(initializer=quiet, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row_made in pool.map(make, families):
            rows.append(row_made)
            print(f"{time.monotonic() - started:.0f} s {row_made}", file=sys.stderr, flush=True)
    if pictured := sum(row_made.pictured for row_made in rows):
        others = f", {pictured} of them were also run with an image"
    start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(start)
    pruned = sum(not row_made.refusal for row_made in rows)
    count = f"transformers {transformers.__version__}: {pruned} of {len(families)} families can be pruned{others}.\n\n"
    DOCUMENT.write_text(
        before + start + count + markdown(rows, columns) + end + rest.partition(end)[2], encoding="utf-8"
    )


def markdown(rows: Sequence[Row], columns: tuple[str, ...]) -> str:
    """A table in which families with the same cells share a row, the most frequent first, and a table of refusals."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for family, cells, refusal, _ in rows:
        groups.setdefault(cells or (short(refusal, family),), []).append(f"`{family}`")
    lines = [
        (*cells, ", ".join(families))
        for cells, families in sorted(groups.items(), key=lambda group: -len(group[1]))
        if len(cells) == len(columns)
    ]
    refusals = [(", ".join(families), *cells) for cells, families in groups.items() if len(cells) == 1]
    return "\n".join(map(table, ((*columns, "families"), ("family", "not pruned because")), (lines, refusals)))


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    heading, *lines = (f"| {' | '.join(line)} |\n" for line in (columns, *rows))
    return "".join([heading, "|", "---|" * len(columns), "\n", *lines])


if __name__ == "__main__":
    main()

"""What every part of a run is worth, on text that it never saw: from a fixed metric to the saved model.

Makes "What each step gains" and rows of "What pruning costs" of research/results.md. Takes about 20 minutes for a
run.

    python benchmarks/ladder.py RUN

The steps that a finished run recorded are cut again, compensated in one shot, and run on windows of other texts; then
the saved models. Every gain is over the line before, with the standard error of the differences window by window.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, run as run_benchmark
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration._pool import evenly_spaced, text_windows
from adapruner.calibration._sources import parse_source
from adapruner.evaluation._losses import window_losses
from adapruner.graph.folder import RunFolder
from adapruner.measurement._moments import StoredMoments
from adapruner.measurement._statistics import Statistics
from adapruner.models._device import in_fastest_dtype
from adapruner.models._loading import load_model, load_tokenizer
from adapruner.models._places import find_model
from adapruner.result import RunResult
from adapruner.search._objective import plan_candidate
from adapruner.search._space import Candidate
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import prune_model


def main(
    run: Path,
    /,
    *,
    windows: int = 192,
    texts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "boolq-passages@report",
        "wikitext2:validation",
        "ptb:validation",
    ),
) -> None:
    """Runs every step on every text.

    Args:
        windows: of each text, evenly spaced.
    """
    root = RunFolder(run)
    config = root.read_config()
    result = RunResult.model_validate_json((root.path / "result.json").read_bytes())
    location = find_model(config.model)
    dense = in_fastest_dtype(load_model(location))
    structure, tokenizer = build_structure(dense), load_tokenizer(location)
    statistics = Statistics.load(root.path / "statistics.safetensors")
    compensation = StoredMoments(root.path / "moments")
    reports = {
        text: evenly_spaced(text_windows(parse_source(text), tokenizer, config.seq_len), windows) for text in texts
    }
    table = Table("step", *reports)
    of_dense: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def show(name: str, model: PreTrainedModel) -> None:
        losses = {text: window_losses(model, part) for text, part in reports.items()}
        cells = []
        for text, own in losses.items():
            cell = f"{math.exp(own.mean()):.2f}"
            if of_dense:
                cell += f" ({math.exp(own.mean() - of_dense[text].mean()):.3f})"
            if before:
                gain = before[text] - own
                cell += f" {gain.mean():+.4f} ± {gain.std() / math.sqrt(len(gain)):.4f}"
            cells.append(cell)
        table.add_row(name, *cells)
        Console(width=200).print(name, *cells)
        if of_dense:
            before.update(losses)
        of_dense.update({} if of_dense else losses)

    def cut(candidate: Candidate) -> PreTrainedModel:
        return prune_model(dense, structure, plan_candidate(structure, statistics, candidate), compensation)

    show("dense", dense)
    for step in result.search.steps:
        show(step.name, cut(step.candidate))
    if result.search.best not in [step.candidate for step in result.search.steps]:
        show("chosen", cut(result.search.best))
    if result.levelled and any(each.accepted for each in result.levelled.moves):
        show("levelled", cut(result.levelled.candidate))
    if (root.path / "compensated").is_dir():
        show("fitted", in_fastest_dtype(load_model(find_model(str(root.path / "compensated")))))
    show("saved", in_fastest_dtype(load_model(find_model(str(root.model)))))
    Console(width=200).print(table)


if __name__ == "__main__":
    run_benchmark(main)

"""What a trial should be judged by: the loss or the divergence from the dense model, before or after compensation.

    python benchmarks/selection.py RUN

For candidates of a finished run, all four on the same objective windows, against the loss of the compensated model on
other texts: rank correlation, and how much worse than the best candidate the one is that each judge would choose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter, run as run_benchmark
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapruner.calibration import evenly_spaced, parse_source, text_windows
from adapruner.evaluation import log_probabilities, window_losses
from adapruner.graph import RunFolder
from adapruner.models import find_model, in_fastest_dtype, load_model, load_tokenizer
from adapruner.option_rules import scoring_count
from adapruner.planning import kept_counts, reference_budget
from adapruner.search import ExtendedSpace, Objective, StudyFile, build_subset_family
from adapruner.structure import build_structure
from adapruner.surgery import Compensation
from measured import Measured


def main(
    run: Path,
    /,
    *,
    candidates: int = 16,
    windows: int = 64,
    texts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "boolq-passages@report",
        "wikitext2:validation",
        "ptb",
    ),
) -> None:
    """Judges the first candidates of a run of the extended space."""
    found = Measured.read(run)
    config, statistics = found.config, found.statistics
    location = find_model(config.model)
    model = in_fastest_dtype(load_model(location))
    structure = build_structure(model)
    tokenizer = load_tokenizer(location)
    budget = reference_budget(config, structure, config.ratio[0])
    subsets = build_subset_family(statistics, structure, kept_counts(structure, budget))
    space = ExtendedSpace(subsets, config.samples, config.seed, budget)
    folder = RunFolder(run)
    record = folder.record("search.json")
    assert record is not None, f"{run} was not searched"
    points = [space.suggest(trial) for trial in StudyFile(folder.study, record.key).finished()]
    points = list({point.model_dump_json(): point for point in points}.values())[:candidates]

    text = found.windows["objective"]
    objective = text[: scoring_count(config.objective_windows, config.final_windows, len(text))]
    compensation = Compensation("least-squares", found.moments)
    references = log_probabilities(model, objective)
    reports = {
        text: evenly_spaced(text_windows(parse_source(text, "report"), tokenizer, 128), windows) for text in texts
    }
    dense = {text: float(window_losses(model, part).mean()) for text, part in reports.items()}

    def judged(by: Objective) -> Tensor:
        return torch.tensor([float(torch.cat(list(by(point))).mean()) for point in points])

    judges = {
        "loss, not compensated": judged(Objective(model, structure, statistics, objective)),
        "loss, compensated": judged(Objective(model, structure, statistics, objective, compensation)),
        "divergence, compensated": judged(
            Objective(model, structure, statistics, objective, compensation, references=references)
        ),
    }
    truth = {
        text: judged(Objective(model, structure, statistics, part, compensation)) - dense[text]
        for text, part in reports.items()
    }
    table = Table("judge", *(f"{text}: rank correlation, loss of its choice, best" for text in truth))
    for name, values in judges.items():
        chosen = int(values.argmin())
        cells = [
            f"{_rank_correlation(values, true):.2f}, {true[chosen]:.4f}, {true.min():.4f}" for true in truth.values()
        ]
        table.add_row(name, *cells)
    Console(width=200).print(table)


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    run_benchmark(main)

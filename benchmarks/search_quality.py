"""What searching the paper's space is worth: LLM-Pruner's metrics on random draws against the search and its parts.

The same budget and number of trials for all.

    python benchmarks/search_quality.py --output runs/search_quality

For every seed: a pool of its own, LLM-Pruner's four metrics on a random draw of 10 of its samples (with the gradient of
the mean loss, as LLM-Pruner takes it), the joint search, the search of samples only and of the metric only, and random
search with as many trials. Perplexities go to results.jsonl, one line per cut model; rerun to resume.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run

import adapruner
from adapruner import PruneConfig
from adapruner.calibration import parse_source, text_windows
from adapruner.evaluation import measure_perplexity
from adapruner.importance import LLM_PRUNER_METRICS, score_groups
from adapruner.measurement import measure
from adapruner.models import find_model, in_fastest_dtype, load_model, load_tokenizer
from adapruner.planning import Budget, PruningPlan, kept_counts, make_plan
from adapruner.search import PaperSpace, build_subset_family
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from measured import Measured, share

VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "random search": {"sampler": "random"},
    "calibration only": {"search": "calibration"},
    "metric only": {"search": "metric"},
}


def main(
    *,
    output: Path,
    model: str = "smollm2",
    ratio: float = 0.2,
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    trials: int = 48,
    calibration: str = "boolq-passages",
    texts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "boolq-passages@report",
        "wikitext2:validation",
        "ptb",
    ),
    windows: int = 192,
) -> None:
    """Runs what results.jsonl does not hold yet."""
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    done = {
        (entry["seed"], entry["name"])
        for entry in map(json.loads, results.read_text().splitlines() if results.exists() else [])
    }
    location = find_model(model)
    tokenizer = load_tokenizer(location)
    dense = load_model(location)
    structure = build_structure(dense)
    evaluated = in_fastest_dtype(dense)
    reports = {}
    for text in texts:
        found = text_windows(parse_source(text, "report"), tokenizer, 128)
        reports[text] = found[torch.arange(windows) * len(found) // windows] if windows < len(found) else found

    def report(seed: int | None, name: str, plan: PruningPlan | None) -> None:
        cut = evaluated if plan is None else prune_model(evaluated, structure, plan)
        perplexity = {text: measure_perplexity(cut, part, text).perplexity for text, part in reports.items()}
        entry = {"seed": seed, "name": name, "perplexity": perplexity, "ratio": plan.ratio if plan else 0.0}
        with results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(name, seed, {text: round(value, 2) for text, value in perplexity.items()}, flush=True)

    def baselines(config: PruneConfig, folder: Path) -> Iterator[tuple[str, PruningPlan]]:
        budget = Budget(ratio, round_to=config.round_to)
        counts = kept_counts(structure, budget)
        found = Measured.read(folder)
        statistics = found.statistics
        subsets = build_subset_family(statistics, structure, counts)
        draw = PaperSpace(subsets, config.samples, config.seed, budget).first_draw
        jointly = measure(dense, structure, found.windows["pool"][draw], batch_size=len(draw), jointly=True)
        for name, point in LLM_PRUNER_METRICS.items():
            # First order from the mean gradient; the Fisher information of param_second from every sample's own.
            measured = statistics.select(draw) if name == "param_second" else jointly
            yield name, make_plan(structure, score_groups(measured, structure, point), counts)

    if (None, "dense") not in done:
        report(None, "dense", None)
    for variant, changes in VARIANTS.items():
        for seed in seeds:
            config = PruneConfig.from_options(
                model=model,
                ratio=ratio,
                calibration=calibration,
                trials=trials,
                seed=seed,
                space="paper",
                compensation="none",
                **changes,
            )
            folder = output / f"{variant.replace(' ', '-')}-{seed}"
            if (seed, variant) not in done:
                if variant != "joint":
                    share(folder, output / f"joint-{seed}")
                result = adapruner.prune(output=folder, config=config)
                report(seed, variant, result.plan)
            if variant == "joint":
                for name, plan in baselines(config, folder):
                    if (seed, name) not in done:
                        report(seed, name, plan)


if __name__ == "__main__":
    run(main)

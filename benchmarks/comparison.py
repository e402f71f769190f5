"""Every method at every ratio: LLM-Pruner, Wanda-sp, FLAP and optipfair against the paper's space and ours.

Makes "Older methods" of research/results.md. Takes about a day: twelve searches, and some hundred pruned models to
evaluate.

    python benchmarks/comparison.py --output runs/comparison

Calibration is on one text, the report on others. For every seed: a pool, a draw of samples and a search of its own.
Perplexities go to results.jsonl, one line per cut model; rerun to resume. At the end, the means over the seeds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from optipfair import prune_model as optipfair_prune
from torch import Tensor, nn
from transformers import PreTrainedModel

import adapruner
from adapruner import PruneConfig, PruneResult, PruningPlan
from adapruner.calibration._pool import evenly_spaced, text_windows
from adapruner.calibration._sources import parse_source
from adapruner.calibration._text import Text, load_texts_by_use
from adapruner.evaluation._perplexity import measure_perplexity
from adapruner.graph.folder import RunFolder
from adapruner.importance._metric import ACTIVATION_METRICS, LLM_PRUNER_METRICS, MetricPoint, score_groups
from adapruner.measurement._moments import InputMoments, StoredMoments
from adapruner.measurement._samples import measure
from adapruner.measurement._statistics import Statistics
from adapruner.models._device import in_fastest_dtype
from adapruner.models._loading import load_model, load_tokenizer
from adapruner.models._places import find_model
from adapruner.planning._budget import Budget, Profile, kept_counts
from adapruner.planning._plan import make_plan
from adapruner.progress import Reporter
from adapruner.run.api import making_of
from adapruner.search._objective import at_budget, plan_candidate
from adapruner.search._space import PaperSpace, build_subset_family
from adapruner.structure._blocks import Structure, count_parameters
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import kept_indices, prune_model
from adapruner.surgery._sequential import refit_sequentially

SEARCHED_RATIO = 0.2
# Where feed-forward channels alone are not enough.
EXTREME_RATIO = 0.5
CALIBRATION = "boolq-passages"


def peer_options(ratio: float) -> dict[str, Any]:
    """Feed-forward channels of layers 4 to 26, which is best for every peer; heads and more layers where these are not
    enough."""
    if ratio < EXTREME_RATIO:
        return {"protect_first": 4, "protect_last": 3, "head_share": 0.0}
    return {"protect_first": 2, "protect_last": 1, "head_share": 1.0}


def peer_budget(ratio: float) -> Budget:
    """The options as a budget."""
    options = peer_options(ratio)
    return Budget(ratio, Profile(options["protect_first"], options["protect_last"]), heads=options["head_share"])


def allocation(name: str, ratio: float) -> dict[str, Any]:
    """What is not searched of a method: the paper's space takes from where the peers take."""
    return peer_options(ratio) if name == "paper" else {}


@dataclass(frozen=True)
class Measured:
    """The options and the measurements of a run.

    Attributes:
        texts: by use.
        moments: empty if the run has none.
    """

    config: PruneConfig
    texts: dict[str, Text]
    statistics: Statistics
    moments: StoredMoments

    @classmethod
    def read(cls, run: Path) -> Measured:
        """From the folder of a run."""
        return cls(
            RunFolder(run).read_config(),
            load_texts_by_use(run / "windows.safetensors"),
            Statistics.load(run / "statistics.safetensors"),
            StoredMoments(run / "moments"),
        )


def share(run: Path, source: Path) -> None:
    """Gives a run what another one with the same inputs has measured, unless it has begun."""
    folder, other = RunFolder(run), RunFolder(source)
    if not folder.config.is_file():
        # A folder with artifacts is taken for a run if it has a config.
        folder.save_config(other.read_config())
        for name in ("windows.safetensors", "moments", "statistics.safetensors"):
            if other.record(name) is not None:
                folder.take_over(name, other)


@dataclass
class Comparison:
    """What all methods share."""

    output: Path
    seeds: tuple[int, ...]
    sequential_seeds: tuple[int, ...]
    trials: int
    objective_windows: int
    dense: PreTrainedModel
    structure: Structure
    reports: dict[str, Tensor]

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"

    def report(self, seed: int | None, ratio: float, method: str, make: Callable[[], PreTrainedModel]) -> None:
        """Evaluates the model of a method, unless that was done."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        if (seed, ratio, method) in {(e["seed"], e["ratio"], e["method"]) for e in map(json.loads, lines)}:
            return
        model = in_fastest_dtype(make())
        removed = 1 - count_parameters(model) / count_parameters(self.dense)
        perplexity = {text: measure_perplexity(model, part, text).perplexity for text, part in self.reports.items()}
        entry = {"seed": seed, "ratio": ratio, "method": method, "removed": removed, "perplexity": perplexity}
        with self.results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(seed, ratio, method, round(removed, 4), {t: round(p, 2) for t, p in perplexity.items()}, flush=True)

    def search(self, seed: int, name: str, **options: Any) -> PruneResult:
        """A run; one that measures the same as the first run of the seed has its measurements."""
        if name == "uniform":
            share(self.folder(seed, name), self.folder(seed, "extended"))
        return adapruner.prune(
            "smollm2",
            output=self.folder(seed, name),
            ratio=SEARCHED_RATIO,
            calibration=CALIBRATION,
            objective_windows=self.objective_windows,
            trials=self.trials,
            sequential=False,
            # As the tables of research/results.md have it; ladder.py shows what these are worth.
            level_rounds=0,
            heal="none",
            compensation_windows=768,
            seed=seed,
            **options,
        )

    def plan(self, seed: int, name: str, ratio: float, **options: Any) -> PruningPlan:
        """The plan of a method: searched at 20 %; at other ratios what `prune --from` makes of that."""
        searched = self.search(seed, name, **options | allocation(name, SEARCHED_RATIO))
        if ratio == SEARCHED_RATIO:
            return searched.plan
        config = searched.result.config.model_copy(update=allocation(name, ratio) | {"ratio": ratio})
        folder = RunFolder(searched.output)
        making = making_of(config, folder, Reporter(quiet=True))
        candidate = at_budget(self.structure, searched.result.search.best, making.value("starting_budget"))
        return plan_candidate(self.structure, making.value("statistics"), candidate)

    def folder(self, seed: int, name: str) -> Path:
        """Where the run of a method is."""
        return self.output / f"{name}-{seed}"


def main(
    *,
    output: Path,
    ratios: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.2, 0.1, 0.3, 0.5),
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    sequential_seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    trials: int = 48,
    objective_windows: int = 64,
    texts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (
        "boolq-passages@report",
        "wikitext2:validation",
        "ptb",
    ),
    windows: int = 64,
) -> None:
    """Runs what results.jsonl does not hold yet.

    Args:
        sequential_seeds: for which of the seeds the last, sequential fit is made, which takes most of the time.
        windows: of each text, evenly spaced.
    """
    output.mkdir(parents=True, exist_ok=True)
    location = find_model("smollm2")
    tokenizer = load_tokenizer(location)
    dense = load_model(location)
    reports = {
        text: evenly_spaced(text_windows(parse_source(text, "report"), tokenizer, 128), windows) for text in texts
    }
    structure = build_structure(dense)
    comparison = Comparison(output, seeds, sequential_seeds, trials, objective_windows, dense, structure, reports)
    comparison.report(None, 0.0, "dense", lambda: dense)
    for ratio in ratios:
        for seed in seeds:
            ours(comparison, seed, ratio)
            peers(comparison, seed, ratio)
    print_table(comparison.results)


def ours(comparison: Comparison, seed: int, ratio: float) -> None:
    """The extended space per layer and uniform, and the paper's space without and with compensation."""
    plans = {
        "extended": comparison.plan(seed, "extended", ratio),
        "uniform": comparison.plan(seed, "uniform", ratio, layout="uniform", round_to=8),
        "paper": comparison.plan(seed, "paper", ratio, space="paper", compensation="none"),
    }
    found = Measured.read(comparison.folder(seed, "extended"))
    compensation = found.moments
    comparison.report(seed, ratio, "paper", cut(comparison, plans["paper"]))
    for name, plan in plans.items():
        comparison.report(seed, ratio, f"{name}, compensated", cut(comparison, plan, compensation))
    if seed in comparison.sequential_seeds:

        def refitted() -> PreTrainedModel:
            dense, structure, plan = comparison.dense, comparison.structure, plans["extended"]
            pruned = prune_model(dense, structure, plan, compensation)
            text = found.texts["compensation"].windows
            refit_sequentially(in_fastest_dtype(dense), pruned, structure, plan, text)
            return pruned

        comparison.report(seed, ratio, "extended, sequential", refitted)


def cut(
    comparison: Comparison, plan: PruningPlan, compensation: Mapping[int, InputMoments] | None = None
) -> Callable[[], PreTrainedModel]:
    """Makes the model of a plan."""
    return lambda: prune_model(comparison.dense, comparison.structure, plan, compensation)


def peers(comparison: Comparison, seed: int, ratio: float) -> None:
    """Every peer on the pool of the seed; LLM-Pruner on the random draw of 10 samples that it takes."""
    structure = comparison.structure
    found = Measured.read(comparison.folder(seed, "extended"))
    statistics, pool = found.statistics, found.texts["pool"].windows
    budget = peer_budget(ratio)
    profile = budget.allocation
    assert isinstance(profile, Profile)

    def plan(measured: Statistics, point: MetricPoint, budget: Budget) -> PruningPlan:
        scores = score_groups(measured, structure, point)
        return make_plan(structure, scores, kept_counts(structure, budget))

    draw = PaperSpace(
        build_subset_family(statistics, structure, kept_counts(structure, budget)), 10, seed, budget
    ).first_draw
    # First order from the mean gradient, as LLM-Pruner takes it; the Fisher information from every sample's own.
    jointly = measure(comparison.dense, structure, pool[draw], batch_size=len(draw), jointly=True)
    made: dict[str, str] = {}
    for name, point in LLM_PRUNER_METRICS.items():
        measured = statistics.select(draw) if name == "param_second" else jointly
        of_metric = plan(measured, point, budget)
        if of_metric.hash in made:
            print(f"LLM-Pruner {name} cuts what {made[of_metric.hash]} cuts", flush=True)
            continue
        made[of_metric.hash] = name
        comparison.report(seed, ratio, f"LLM-Pruner {name}", cut(comparison, of_metric))
    wanda = plan(statistics, ACTIVATION_METRICS["wanda_sp"], budget)
    comparison.report(seed, ratio, "Wanda-sp", cut(comparison, wanda))
    scores = score_groups(statistics, structure, ACTIVATION_METRICS["flap"])
    flap = make_plan(structure, scores, ranked_counts(structure, profile, ratio, scores))
    means = statistics.input_mean.mean(0).split([block.inputs for block in structure.blocks])
    comparison.report(seed, ratio, "FLAP", lambda: with_biases(comparison, flap, means))
    comparison.report(seed, ratio, "optipfair", lambda: optipfair(comparison.dense, pool, ratio))


def ranked_counts(structure: Structure, profile: Profile, ratio: float, scores: Tensor) -> list[int]:
    """FLAP's counts: the groups of lowest score in all layers that are not protected are removed, heads and channels
    together; each block keeps its best group."""
    weights, sizes = profile.weights(structure.layers), [block.groups for block in structure.blocks]
    owners = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    parameters = torch.tensor([block.parameters_per_group for block in structure.blocks])[owners]
    keys = torch.cat(
        [
            own.where((own != own.max()) & bool(weights[block.layer]), torch.tensor(torch.inf))
            for block, own in zip(structure.blocks, scores.double().split(sizes), strict=True)
        ]
    )
    ascending = keys.argsort(stable=True)
    removed = int((parameters[ascending].cumsum(0) <= ratio * structure.total_parameters).sum())
    return [size - int((owners[ascending[:removed]] == number).sum()) for number, size in enumerate(sizes)]


def with_biases(comparison: Comparison, plan: PruningPlan, means: Sequence[Tensor]) -> PreTrainedModel:
    """FLAP's compensation: biases with the mean output of the removed inputs, whose means are given block by block."""
    pruned = prune_model(comparison.dense, comparison.structure, plan)
    for block, kept, mean in zip(comparison.structure.blocks, plan.blocks, means, strict=True):
        is_removed = torch.ones(block.inputs, dtype=torch.bool)
        is_removed[kept_indices(kept, [block.row_wise], block.inputs)[0]] = False
        weight: Any = comparison.dense.get_submodule(block.row_wise.module).weight
        bias = weight[:, is_removed].float() @ mean[is_removed].float()
        pruned.get_submodule(block.row_wise.module).bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return pruned


def optipfair(dense: PreTrainedModel, pool: Tensor, ratio: float) -> PreTrainedModel:
    """optipfair's MAW with data from its own package: feed-forward channels of layers 4 to 26, of all at 50 %."""
    layers = list(range(4, 27)) if ratio < EXTREME_RATIO else list(range(30))
    prunable = len(layers) * 3 * dense.config.hidden_size * dense.config.intermediate_size
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in pool.split(4)]
    pruned: PreTrainedModel = optipfair_prune(
        copy.deepcopy(dense),
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * ratio * count_parameters(dense) / prunable,
        dataloader=batches,
        layer_indices=layers,
        show_progress=False,
    )
    return pruned


def print_table(results: Path) -> None:
    """Markdown: for every ratio and method the mean over the seeds and, in brackets, the least and the greatest."""
    rows: dict[tuple[float, str], list[dict[str, float]]] = {}
    for entry in map(json.loads, results.read_text().splitlines()):
        rows.setdefault((entry["ratio"], entry["method"]), []).append(entry["perplexity"])
    for (ratio, method), found in sorted(rows.items()):
        cells = []
        for text in found[0]:
            values = [perplexity[text] for perplexity in found]
            cells.append(f"{fmean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        print(f"| {ratio:.0%} | {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)

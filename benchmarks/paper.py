"""The paper's experiment on models that are at hand: what its search finds, beside LLM-Pruner, luck, and ours.

Makes "The paper's method" of research/paper.md. The protocol is that of the recipes `paper-20`, `paper-50` and `paper`,
with novels instead of BookCorpus and the part of Stanford Alpaca that is in the same folder. Every method removes the
same number of groups from the same layers, but for ours, which removes as many parameters from layers of its choice.
All methods of a seed read the same text. No choice depends on what is reported.

Every row is written when it is known, and a call that was stopped resumes. Models of a plan are cut again where a later
row needs them, so tasks and training can be added by a later call.

    python benchmarks/paper.py --model smollm2 --output runs/paper --seeds 0 1 2 3 4
    python benchmarks/paper.py --model smollm2 --output runs/paper --seeds 0 --tune --tasks 500

| method | what it is |
|---|---|
| random, l1, l2 | random ranks; the sum of the magnitudes, or of their squares, of all weights of a group |
| vector, first, second, mixed | LLM-Pruner's metrics, each on ten samples that the seed draws from the pool |
| samples, metric, joint | the search of the paper: over samples with `first`, over metrics with one draw, over both |
| points | as many random points of the same space |
| start-points | the same with the starting points of `joint`, so that the sampler is all that differs from it |
| draws | as many draws of ten samples, with the four metrics of LLM-Pruner in turn |
| quick, standard | ours, on the same text, in closed form; and trained |
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from optuna.trial import BaseTrial
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner import PruneConfig, PruningPlan, recover
from adapruner.base.files import find_local_data
from adapruner.budget.counts import kept_counts, reference_budget
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation.losses import window_losses
from adapruner.evaluation.tasks import load_tasks, mean_accuracies, measure_tasks
from adapruner.importance import LLM_PRUNER_METRICS, score_groups
from adapruner.measurement.taylor import Statistics, measure
from adapruner.model.loading import in_fastest_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.recipes import read_recipe
from adapruner.search.judging import Objective, plan_candidate
from adapruner.search.space import Candidate, PaperSpace, StartingPoint, build_subset_family
from adapruner.search.study import Search, SearchResult, StudyFile
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.sources import parse_source
from adapruner.text.windows import Text, evaluation_text, load_texts_by_use, start_of_windows
from models import prune, shown

TEXTS = ("wikitext2:test", "ptb:validation")
POOL, ALPACA = "books/gutenberg_passages.jsonl", "instruction/alpaca_stanford_subset.jsonl"
MAGNITUDES = {"l1": 1, "l2": 2}
LLM_PRUNER = {"vector": "vectorize", "first": "param_first", "second": "param_second", "mixed": "param_mix"}
SEARCHED = {"samples": "calibration", "metric": "metric", "joint": "joint"}
OURS = {"quick": {"effort": "quick"}, "standard": {"effort": "standard"}}
# They do not depend on the seed.
WITHOUT_SEED = ("dense", *MAGNITUDES)
METHODS = ("dense", "random", *MAGNITUDES, *LLM_PRUNER, *SEARCHED, "points", "start-points", "draws", "quick")
# Stands for the metric of LLM-Pruner with the least loss on the text of the search.
BEST = "best of LLM-Pruner"
Several = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
Numbers = Annotated[tuple[int, ...], Parameter(consume_multiple=True)]


def main(
    *,
    model: str,
    output: Path,
    text: Path | None = None,
    ratios: Numbers = (20, 50),
    seeds: Numbers = (0,),
    methods: Several = METHODS,
    tune: bool = False,
    tuned: Several = (BEST, "joint", "quick"),
    records: int | None = None,
    tasks: int = 0,
    reported: int = 256,
    trials: int = 48,
    pool: int = 64,
    objective_windows: int = 64,
) -> None:
    """Runs what results.jsonl does not hold yet: the rows of the first ratio, seed by seed, then those of the next.

    Args:
        text: to calibrate on; by default the novels of `$ADAPRUNER_DATA`.
        ratios: the recipes: 20 is paper-20.
        methods: by default all but `standard`, which takes longest.
        tune: train the models of some methods, those of the first seed, with the recipe `paper`.
        tuned: these methods.
        records: examples to train on, at most.
        tasks: items of each commonsense task, for the first seed; 0 is none.
        reported: windows of 128 tokens of each text, evenly spaced.
        trials, pool, objective_windows: of each search.
    """
    setting = Setting(model, text or at_hand(POOL), output, trials, pool, objective_windows)
    rows = Rows(output / "results.jsonl", {"model": shown(model), "reported": reported})
    for ratio, seed, method in product(ratios, seeds, methods):
        is_first = seed == seeds[0]
        if not is_first and method in WITHOUT_SEED:
            continue
        cell = Cell(setting, 0 if method == "dense" else ratio, method, seed)
        rows.add(cell.name, partial(made, cell, reported, rows))
        if is_first and tasks:
            rows.add(cell.name | {"tasks": tasks}, partial(scored, cell, tasks))
    for ratio, method in product(ratios, tuned if tune else ()):
        trained = rows.best(ratio, seeds[0]) if method == BEST else method
        cell = Cell(setting, ratio, trained, seeds[0], records, is_trained=True)
        rows.add(cell.name, partial(made, cell, reported, rows))
        if tasks:
            rows.add(cell.name | {"tasks": tasks}, partial(scored, cell, tasks))


def at_hand(name: str) -> Path:
    """A file of `$ADAPRUNER_DATA`."""
    path = find_local_data(name)
    assert path is not None, f"no folder of ADAPRUNER_DATA has {name}"
    return path


class Rows:
    """The rows of a results file; a row is made if no row in it has the same name.

    Attributes:
        common: part of the name of every row.
    """

    def __init__(self, file: Path, common: dict[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.common = file, common
        self.known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def add(self, name: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        name = {"tasks": 0} | self.common | name
        if any(row.items() >= name.items() for row in self.known):
            return
        begun = time.time()
        row = name | make() | {"wall": round(time.time() - begun), "at": time.strftime("%FT%T")}
        with self.file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")
        self.known.append(row)
        print({key: value for key, value in row.items() if key not in ("losses", "right")}, flush=True)

    def measured(self, plan: str, seed: int) -> dict[str, Any] | None:
        """What was measured of a plan, on the text of a seed."""
        name = self.common | {"plan": plan, "seed": seed}
        same = next((row for row in self.known if row.items() >= name.items()), None)
        return same and {name: same[name] for name in ("parameters", "objective", "perplexity", "losses")}

    def best(self, ratio: int, seed: int) -> str:
        """The metric of LLM-Pruner with the least loss on the text of the search."""
        name = self.common | {"ratio": ratio, "seed": seed, "tasks": 0, "trained": False}
        rows = [row for row in self.known if row.items() >= name.items() and row["method"] in LLM_PRUNER]
        return str(min(rows, key=lambda row: float(row["objective"]))["method"])


@dataclass(frozen=True)
class Setting:
    """What all rows of a call share."""

    model: str
    text: Path
    output: Path
    trials: int
    pool: int
    objective_windows: int

    @cached_property
    def dense(self) -> PreTrainedModel:
        return load_model(find_model(self.model))

    @cached_property
    def fast(self) -> PreTrainedModel:
        return in_fastest_dtype(self.dense)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(find_model(self.model))

    @cached_property
    def structure(self) -> Structure:
        return build_structure(self.dense)

    @cached_property
    def _pools(self) -> dict[int, Pool]:
        return {}

    def options(self, ratio: int, seed: int) -> dict[str, Any]:
        """Of a run with the recipe of the paper."""
        search = {"trials": self.trials, "pool": self.pool, "objective_windows": self.objective_windows}
        given = {"calibration": str(self.text), "tasks": (), "evaluate": ("ptb",), "seed": seed}
        return read_recipe(f"paper-{ratio}") | search | given

    def counts(self, ratio: int) -> list[int]:
        config = PruneConfig.from_options(**self.options(ratio, 0) | {"model": self.model})
        return kept_counts(self.structure, reference_budget(config, self.structure, config.ratio))

    def pooled(self, seed: int) -> Pool:
        """The pool of a seed, and the text on which searches judge."""
        if seed not in self._pools:
            folder = self.output / f"{shown(self.model)}-pool-{seed}"
            seconds = self.prune(self.options(20, seed), folder, "statistics.safetensors")
            texts = load_texts_by_use(folder / "windows.safetensors")
            statistics = Statistics.load(folder / "statistics.safetensors")
            losses = window_losses(self.fast, texts["objective"].windows)
            self._pools[seed] = Pool(texts["pool"], texts["objective"], statistics, losses, seconds)
        return self._pools[seed]

    def prune(self, options: dict[str, Any], folder: Path, until: str = "model") -> float:
        """Runs the command of a user, as far as that; its processor seconds, with those of what is taken over."""
        begun = time.process_time()
        taken = prune(self.model, str(self.text), options, self.output, folder, until)
        return taken + time.process_time() - begun


@dataclass(frozen=True)
class Pool:
    """The text of a seed.

    Attributes:
        text: from which samples are selected.
        objective: on which searches judge.
        statistics: of the pool.
        dense_losses: [windows], of the dense model on the objective.
        seconds: of the processor, to draw and measure it.
    """

    text: Text
    objective: Text
    statistics: Statistics
    dense_losses: Tensor
    seconds: float


@dataclass(frozen=True)
class Cell:
    """One model of the table."""

    setting: Setting
    ratio: int
    method: str
    seed: int
    records: int | None = None
    is_trained: bool = False

    @property
    def name(self) -> dict[str, Any]:
        name = {"ratio": self.ratio, "method": self.method, "seed": self.seed, "trained": self.is_trained}
        return name | ({"records": self.records} if self.is_trained else {})

    @property
    def folder(self) -> Path:
        return self.setting.output / f"{shown(self.setting.model)}-{self.ratio}-{self.method}-{self.seed}"

    def made(self) -> dict[str, Any]:
        """Makes the plan or the checkpoint; what it took. The search and ours load the model themselves."""
        self.setting.pooled(self.seed)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the process is counted from here
        evaluations: dict[str, Any] = {}
        begun, of_others = time.process_time(), 0.0
        if self.is_trained:
            untrained = replace(self, is_trained=False)
            if not (self.folder / "model").exists():
                save_checkpoint(untrained.loaded(), self.setting.tokenizer, self.folder / "model")
            record = recover(
                self.folder / "model",
                str(at_hand(ALPACA)),
                self.folder / f"tuned-{self.records}",
                recipe="paper",
                records=self.records,
                micro_batch_size=8,
            )
            evaluations = {"steps": record.steps, "best_step": record.best_step, "tokens": record.tokens}
        elif self.method != "dense":
            of_others, evaluations = self._prune()
        seconds = of_others + time.process_time() - begun
        status = Path("/proc/self/status").read_text().split()
        peak = int(status[status.index("VmHWM:") + 1]) * 1024
        # The plan tells all of a model that is neither corrected nor trained.
        is_cut_alone = not self.is_trained and self.method not in ("dense", *OURS)
        plan = PruningPlan.load(self.folder / "plan.json").hash if is_cut_alone else None
        return {"plan": plan, "seconds": round(seconds), "peak": peak, **evaluations}

    def _prune(self) -> tuple[float, dict[str, Any]]:
        """The processor seconds of what other cells measured, and the work of the search."""
        setting, seed = self.setting, self.seed
        self.folder.mkdir(exist_ok=True)
        counts = setting.counts(self.ratio)
        if self.method in OURS:
            share = setting.structure.removed_parameters(counts) / setting.structure.total_parameters
            begun = time.process_time()
            seconds = setting.prune(OURS[self.method] | {"ratio": share, "seed": seed}, self.folder)
            return seconds - (time.process_time() - begun), {}
        if self.method in SEARCHED:
            options = setting.options(self.ratio, seed) | {"search": SEARCHED[self.method]}
            begun = time.process_time()
            seconds = setting.prune(options, self.folder, "plan.json")
            result = SearchResult.model_validate_json((self.folder / "search.json").read_bytes())
            return seconds - (time.process_time() - begun), work_of(result)
        if self.method in SPACES:
            plan, result = self._searched(counts)
            plan.save(self.folder / "plan.json")
            return setting.pooled(seed).seconds, work_of(result)
        make_plan(setting.structure, self._scores(), counts).save(self.folder / "plan.json")
        return 0.0, {}

    def _scores(self) -> Tensor:
        setting, chosen = self.setting, torch.Generator().manual_seed(self.seed)
        if self.method == "random":
            return torch.rand(setting.structure.group_offsets[-1], generator=chosen)
        if self.method in MAGNITUDES:
            return magnitudes(setting.dense, setting.structure, MAGNITUDES[self.method])
        pool = setting.pooled(self.seed).text.windows
        samples = pool[torch.randperm(len(pool), generator=chosen)[:10]]
        # First order of the mean gradient, second order of every sample, as LLM-Pruner takes them.
        statistics = measure(setting.dense, setting.structure, samples, len(samples), jointly=self.method != "second")
        if self.method == "mixed":
            squares = measure(setting.dense, setting.structure, samples, 2).element_squared.mean(0, keepdim=True)
            statistics = replace(statistics, element_squared=squares)
        return score_groups(statistics, setting.structure, LLM_PRUNER_METRICS[LLM_PRUNER[self.method]])

    def _searched(self, counts: Sequence[int]) -> tuple[PruningPlan, SearchResult]:
        """The best of points that no sampler proposes, by the judge of `joint`."""
        setting, pool = self.setting, self.setting.pooled(self.seed)
        family = build_subset_family(pool.statistics, setting.structure, counts)
        space = SPACES[self.method](family, 10, self.seed, alignment="paper")
        windows, losses = pool.objective.windows, pool.dense_losses
        judge = Objective(setting.fast, setting.structure, pool.statistics, counts, windows, losses)
        study = StudyFile(self.folder / "study.jsonl", self.method)
        search = Search(space, judge, setting.trials, self.seed, study)
        search.run()
        result = search.result(pool.objective.kinds)
        (self.folder / "search.json").write_text(result.model_dump_json())
        return plan_candidate(setting.structure, pool.statistics, result.best, counts), result

    def loaded(self) -> PreTrainedModel:
        """The model, which is made."""
        if self.method == "dense":
            return self.setting.dense
        if self.is_trained:
            return load_model(find_model(str(self.folder / f"tuned-{self.records}")))
        if self.method in OURS:
            return load_model(find_model(str(self.folder / "model")))
        plan = PruningPlan.load(self.folder / "plan.json")
        return prune_model(self.setting.dense, self.setting.structure, plan, None)


class _Random:
    """A trial whose values are random."""

    def __init__(self, order: random.Random) -> None:
        self.order = order

    def suggest_float(self, name: str, low: float, high: float, /) -> float:
        return self.order.uniform(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
        return self.order.choice(choices)


class Points(PaperSpace):
    """Random points of the space of the paper."""

    def starting_points(self) -> list[StartingPoint]:
        return []

    def suggest(self, trial: BaseTrial) -> Candidate:
        return self._ask(_Random(random.Random(f"{self.seed}/{trial.number}")))  # type: ignore[arg-type]


class StartPoints(Points):
    """The same after the starting points."""

    def starting_points(self) -> list[StartingPoint]:
        return PaperSpace.starting_points(self)

    def suggest(self, trial: BaseTrial) -> Candidate:
        is_start = trial.number < len(self.starting_points())
        return PaperSpace.suggest(self, trial) if is_start else super().suggest(trial)


class Draws(Points):
    """Random samples, and the metrics of LLM-Pruner in turn."""

    def suggest(self, trial: BaseTrial) -> Candidate:
        order, metrics = random.Random(f"{self.seed}/{trial.number}"), list(LLM_PRUNER_METRICS.values())
        samples = sorted(order.sample(range(len(self.subsets.gram)), self.samples))
        return Candidate(point=metrics[trial.number % len(metrics)], samples=tuple(samples))


SPACES: dict[str, type[Points]] = {"points": Points, "start-points": StartPoints, "draws": Draws}


def magnitudes(model: PreTrainedModel, structure: Structure, power: int) -> Tensor:
    """[groups]: the sum of this power of the magnitudes of all weights in matrices."""
    scores = []
    for block in structure.blocks:
        of_block = torch.zeros(block.groups, dtype=torch.float64)
        for matrix in block.matrices:
            weights = matrix.as_projections(model.get_parameter(matrix.parameter).detach())[0].double()
            of_vectors = weights.abs().pow(power).sum(1 - matrix.axis)
            own = of_vectors[matrix.offset : matrix.offset + block.groups * matrix.width]
            of_block += own.view(block.groups, -1).sum(1)
        scores.append(of_block)
    return torch.cat(scores)


def work_of(result: SearchResult) -> dict[str, Any]:
    """What a search did, and whether its best point was given to it."""
    best = result.points[result.best_trial]
    return {
        "evaluations": len(result.points),
        "judged_windows": sum(point.windows for point in result.points),
        "best_trial": result.best_trial,
        "is_start": best.starting_point,
        "best_fixed": result.best_fixed_loss,
    }


def made(cell: Cell, reported: int, rows: Rows) -> dict[str, Any]:
    """Makes a model: what it took, its perplexity in the protocol of LLM-Pruner, and its loss on the text of searches.
    Of tokenizers with a token for the beginning of a text, also with that, which the protocol leaves out."""
    row, pool = cell.made(), cell.setting.pooled(cell.seed)
    if row["plan"] and (known := rows.measured(row["plan"], cell.seed)):
        return row | known
    fast = in_fastest_dtype(cell.loaded())
    row |= {"parameters": count_parameters(fast), "perplexity": {}, "losses": {}}
    row["objective"] = float((window_losses(fast, pool.objective.windows) - pool.dense_losses).mean())
    has_start = bool(len(start_of_windows(cell.setting.tokenizer, 128)))
    for of, bos in product(TEXTS, (False, True) if has_start else (False,)):
        source, title = parse_source(of, "report"), of + (", BOS" if bos else "")
        windows = evaluation_text(source, cell.setting.tokenizer, 128, reported, bos=bos).windows
        losses = window_losses(fast, windows)
        row["perplexity"][title] = float(losses.mean().exp())
        row["losses"][title] = [round(loss, 4) for loss in losses.tolist()]
    return row


def scored(cell: Cell, tasks: int) -> dict[str, Any]:
    """The scores of the seven tasks, and which items are right."""
    fast = in_fastest_dtype(cell.loaded())
    scores = measure_tasks(fast, cell.setting.tokenizer, load_tasks(["commonsense"], tasks))
    return {
        "scores": {score.task: score.metrics for score in scores},
        "means": mean_accuracies([score.metrics for score in scores]),
        "items": {score.task: score.items for score in scores},
        "right": {score.task: score.right for score in scores},
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    run(main)

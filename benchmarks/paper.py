"""The paper's experiment on models that are at hand: LLM-Pruner with random samples, AdaPruner as in the paper, ours.

Makes "The paper's method" of research/results.md. The protocol is that of the recipes `paper-20` and `paper-50`, with
text at hand in place of BookCorpus. LLM-Pruner has the widths of the recipe, its four metrics, and ten samples drawn
from the pool that the search reads; ours removes as many parameters of all. `--tune` trains LoRA adapters with the
settings of LLM-Pruner on so many records. Every number is saved when it is known: a call that was stopped resumes.

    python benchmarks/paper.py --model MODEL --text BOOKS --output runs/paper --tune ALPACA --tasks 100
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter, run
from transformers import PreTrainedModel

from adapruner import recover
from adapruner.budget.counts import kept_counts, reference_budget
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation.losses import measure_perplexity
from adapruner.evaluation.tasks import load_tasks, measure_tasks
from adapruner.importance import LLM_PRUNER_METRICS, score_groups
from adapruner.measurement.taylor import measure
from adapruner.model.loading import in_fastest_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import PruneConfig
from adapruner.recipes import read_recipe
from adapruner.structure.blocks import count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.sources import parse_source
from adapruner.text.windows import evaluation_text, load_texts_by_use
from models import prune, shown

TEXTS = ("wikitext2:validation", "ptb:validation")
SEARCHED = {"joint": "joint", "samples alone": "calibration", "metric alone": "metric"}
OURS = "ours, `quick`"
TUNED = ", LoRA"
Several = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]


def main(
    *,
    model: str,
    text: Path,
    output: Path,
    ratios: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (20, 50),
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0,),
    methods: Several = ("dense", *SEARCHED, *LLM_PRUNER_METRICS, OURS),
    tune: Path | None = None,
    tuned: Several = ("joint", "param_first", OURS),
    records: int = 1000,
    tasks: int = 0,
    reported: int = 100,
    trials: int = 48,
    objective_windows: int = 96,
) -> None:
    """Runs what results.jsonl does not hold yet.

    Args:
        text: to calibrate on.
        ratios: the recipes: 20 is paper-20.
        methods: of the metrics of LLM-Pruner, all seeds count; of the others too.
        tune: instructions with answers.
        tuned: methods that are trained too, with the first seed.
        records: of these, at most.
        tasks: items of each commonsense task, for what is trained and the dense model; 0 is none.
        reported: windows of 128 tokens of each text, evenly spaced.
        trials, objective_windows: of each search.
    """
    search = {"trials": trials, "objective_windows": objective_windows}
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(entry["model"], entry["ratio"], entry["method"], entry["seed"]) for entry in known}

    def add(ratio: int, method: str, seed: int, folder: str | Path, with_tasks: bool, seconds: float) -> None:
        entry = {"model": shown(model), "ratio": ratio, "method": method, "seed": seed, "seconds": round(seconds)}
        entry |= measured(folder, model, reported, tasks if with_tasks else 0)
        with file.open("a") as opened:
            opened.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    if "dense" in methods and (shown(model), 0, "dense", 0) not in done:
        add(0, "dense", 0, model, with_tasks=True, seconds=0.0)
    for ratio in ratios:
        for seed in seeds:
            for method in methods:
                if method == "dense":
                    continue
                folder = output / f"{shown(model)}-{ratio}-{method}-{seed}"
                is_tuned = tune is not None and method in tuned and seed == seeds[0]
                trained = (shown(model), ratio, method + TUNED, seed)
                begun = time.process_time()
                if (shown(model), ratio, method, seed) not in done:
                    make(model, text, ratio, method, seed, folder, output, search)
                    add(ratio, method, seed, folder / "model", is_tuned, time.process_time() - begun)
                if is_tuned and trained not in done:
                    begun = time.process_time()
                    recover(folder / "model", str(tune), folder / "tuned", records=records, micro_batch_size=8)
                    add(ratio, method + TUNED, seed, folder / "tuned", True, time.process_time() - begun)
                for made in folder.glob("*/*.safetensors"):
                    made.unlink()


def make(
    model: str, text: Path, ratio: int, method: str, seed: int, folder: Path, output: Path, search: dict[str, int]
) -> None:
    """Writes the model that a method makes."""
    recipe = read_recipe(f"paper-{ratio}") | {"tasks": (), "evaluate": ("ptb",), "calibration": str(text), "seed": seed}
    if method in SEARCHED:
        prune(model, str(text), recipe | search | {"search": SEARCHED[method]}, output, folder)
        return
    dense = load_model(find_model(model))
    structure = build_structure(dense)
    config = PruneConfig.from_options(**recipe | {"model": model})
    counts = kept_counts(structure, reference_budget(config, structure, config.ratio))
    if method == OURS:
        share = structure.removed_parameters(counts) / structure.total_parameters
        prune(model, str(text), {"effort": "quick", "ratio": share, "seed": seed}, output, folder)
        return
    # The samples among which the search chooses.
    searched = next(output.glob(f"{shown(model)}-*-joint-{seed}/windows.safetensors"))
    pool = load_texts_by_use(searched)["pool"].windows
    samples = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: config.samples]]
    # First order from the mean gradient, as LLM-Pruner takes it.
    at_once = method != "param_second"
    statistics = measure(dense, structure, samples, batch_size=len(samples) if at_once else 2, jointly=at_once)
    scores = score_groups(statistics, structure, LLM_PRUNER_METRICS[method])
    cut = prune_model(dense, structure, make_plan(structure, scores, counts), None)
    save_checkpoint(cut, load_tokenizer(find_model(model)), folder / "model")


def measured(folder: str | Path, original: str, reported: int, tasks: int) -> dict[str, Any]:
    """Perplexity in the protocol of LLM-Pruner, and the scores of tasks."""
    tokenizer = load_tokenizer(find_model(original))
    made: PreTrainedModel = load_model(find_model(str(folder)))
    fast = in_fastest_dtype(made)
    found: dict[str, Any] = {"parameters": count_parameters(made), "perplexity": {}}
    for of in TEXTS:
        windows = evaluation_text(parse_source(of, "report"), tokenizer, 128, reported, bos=False).windows
        found["perplexity"][of] = measure_perplexity(fast, windows, of).perplexity
    if tasks:
        scores = measure_tasks(fast, tokenizer, load_tasks(["commonsense"], tasks))
        found["tasks"] = {score.task: score.metrics for score in scores}
        found["right"] = {score.task: score.right for score in scores}
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    run(main)

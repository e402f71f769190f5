"""What a trial costs against the forward pass of the pruned model, and what stopping trials early saves and costs.

    python benchmarks/searching.py --run runs/measured --model smollm2

`--run` is a run folder that was measured before (`adapruner prune … -o runs/measured`). A trial: choosing, building,
looking at all objective windows; the forward pass: the pruned model alone over the same windows. For every seed, two
searches over the same statistics, one that stops bad trials and one that does not, whose choices are judged on the
windows for the final choice, which neither saw.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from cyclopts import run as run_benchmark
from torch import Tensor
from transformers import PreTrainedModel

from adapruner import RunResult
from adapruner.evaluation import compute_prefix, losses_by_batch
from adapruner.importance import MetricPoint
from adapruner.models import find_model, in_fastest_dtype, load_model
from adapruner.option_rules import scoring_count
from adapruner.planning import kept_counts, reference_budget
from adapruner.search import (
    Candidate,
    ExtendedSpace,
    Objective,
    Search,
    SearchSpace,
    StudyFile,
    build_subset_family,
    meet_budget,
    plan_candidate,
)
from adapruner.search._space import MOST_PROTECTED_FIRST
from adapruner.structure import build_structure
from adapruner.surgery import Compensation, prune_model
from machine import describe, seconds
from measured import Measured

STAGES = ("reading activations", "measuring", "comparing removals", "searching", "compensating", "saving")


def main(
    *, run: Path, model: str = "smollm2", windows: int = 64, trials: int = 48, seeds: Sequence[int] = (0, 1, 2)
) -> None:
    """Prints the ratio of a trial, and a line for every search."""
    found = Measured.read(run)
    config, measured = found.config, found.statistics
    dense = in_fastest_dtype(load_model(find_model(model)))
    structure = build_structure(dense, config.head_granularity)
    text = found.windows["objective"]
    objective, final = text[:windows], text[scoring_count(config.objective_windows, config.final_windows, len(text)) :]
    budget = reference_budget(config, structure, config.ratio[0])
    family = build_subset_family(measured, structure, kept_counts(structure, budget))
    meet = partial(meet_budget, structure, measured, None)
    space = ExtendedSpace(family, config.samples, 0, budget, meet=meet)
    compensation = Compensation("least-squares", found.moments)
    prefix = compute_prefix(dense, objective, MOST_PROTECTED_FIRST)
    judge = Objective(dense, structure, measured, objective, compensation, prefix)
    looked_at = 0
    known: dict[str, list[Tensor]] = {}

    def counted(candidate: Candidate) -> Iterator[Tensor]:
        """Every search begins with the same candidates, whose losses are the same."""
        nonlocal looked_at
        seen: list[Tensor] = []
        for batch in known.get(candidate.model_dump_json()) or judge(candidate):
            looked_at += len(batch)
            seen.append(batch)
            yield batch
        known[candidate.model_dump_json()] = seen

    print(describe())
    compare_whole_run(run, found, dense, objective)
    compare_trial(judge, space, objective)
    for seed in seeds:
        for stops_early in (False, True):
            looked_at = 0
            with tempfile.TemporaryDirectory() as files:
                study = StudyFile(Path(files) / "study.jsonl", "benchmark")
                search = Search(replace(space, seed=seed), counted, trials, seed, study, stops_early=stops_early)
                search.run()
                result = search.result()
            chosen = torch.cat(list(replace(judge, windows=final, prefix=None)(result.best))).mean()
            print(
                f"seed {seed}, {'bad trials stopped' if stops_early else 'no trial stopped'}: {looked_at} of"
                f" {trials * len(objective)} windows; chosen {result.best_loss:.4f} nats, on"
                f" {len(final)} further windows {chosen:.4f}",
                flush=True,
            )


def compare_whole_run(run: Path, found: Measured, dense: PreTrainedModel, text: Tensor) -> None:
    """All stages of the run against one forward pass of the dense model over every window that it saw: the pool, the
    text of compensation once for the moments and once to fit, and whatever trials looked at."""
    result = RunResult.model_validate_json((run / "result.json").read_bytes())
    in_trials = sum(point.windows for point in result.search.points)
    finalists = 4 * found.config.final_windows
    used = found.windows
    windows = len(used["pool"]) + 2 * len(used["compensation"]) + in_trials + finalists
    list(losses_by_batch(dense, text))
    forward = seconds(lambda: list(losses_by_batch(dense, text))) / len(text)
    took = {stage: cost.seconds for stage, cost in result.stages.items() if stage in STAGES}
    print(
        f"the whole run: {sum(took.values()):.0f} s ({', '.join(f'{stage} {s:.0f}' for stage, s in took.items())}),"
        f" {windows} windows seen: {sum(took.values()) / (windows * forward):.2f} forwards over all of them"
    )


def compare_trial(judge: Objective, space: SearchSpace, objective: Tensor) -> None:
    """A trial against the forward pass of its model, taking turns."""
    candidate = Candidate(
        point=MetricPoint(weights={"fine_first": 0.3, "reconstruction": 0.3, "elimination": 0.4}),
        samples=tuple(space.first_draw),
        budget=space.budget,
    )
    plan = plan_candidate(judge.structure, judge.statistics, candidate)
    pruned = prune_model(judge.model, judge.structure, plan, judge.compensation)
    choosing = seconds(lambda: plan_candidate(judge.structure, judge.statistics, candidate))
    building = seconds(lambda: prune_model(judge.model, judge.structure, plan, judge.compensation))

    def forward() -> None:
        with torch.inference_mode():
            for batch in objective.split(4):
                pruned(batch, use_cache=False)

    forward()
    # Each with a judge of its own: one does not judge a plan twice.
    pairs = [(seconds(lambda: list(replace(judge)(candidate))), seconds(forward)) for _ in range(5)]
    ratios = [trial / own for trial, own in pairs]
    alone = seconds(lambda: list(losses_by_batch(pruned, objective)))
    print(
        f"a trial over {len(objective)} windows: {statistics.median(t for t, _ in pairs):.2f} s, of which choosing"
        f" {choosing * 1000:.0f} ms, building {building:.2f} s; the pruned model's forward"
        f" {statistics.median(f for _, f in pairs):.2f} s (losses without reuse {alone:.2f} s):"
        f" {statistics.median(ratios):.2f} forwards ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    run_benchmark(main)

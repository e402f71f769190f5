"""The numbers of a run, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapruner.artifacts import Form, artifact
from adapruner.callbacks import tell
from adapruner.card import model_card
from adapruner.checkpoint import write_card
from adapruner.costs import TargetOutcome
from adapruner.job import Job
from adapruner.models import describe_device, empty_model, find_model, load_config
from adapruner.planning import PruningPlan
from adapruner.procedure._evaluation import breakage, perplexity, scores
from adapruner.procedure._forms import Windows, json_form
from adapruner.procedure._model import compensated, model, recovered, scales_were_tuned, target
from adapruner.procedure._search import levelled, plan, search
from adapruner.procedure._windows import self_written, usable, windows
from adapruner.recovery import read_record
from adapruner.report import render_report
from adapruner.result import ForeignVocabulary, ModelNumbers, Role, RunResult, roles_of, verdict_of
from adapruner.search import Levelled, SearchResult
from adapruner.structure import build_structure
from adapruner.tokens import foreign_tokens

PAGE: Form[str] = Form(
    lambda page, path: path.write_text(page, encoding="utf-8"), lambda path: path.read_text(encoding="utf-8")
)


@artifact(
    "result.json",
    json_form(RunResult),
    inputs=(
        windows,
        self_written,
        search,
        levelled,
        plan,
        compensated,
        model,
        target,
        recovered,
        *perplexity.values(),
        *scores.values(),
        *breakage.values(),
    ),
    beside=("model/README.md", "recovered/README.md"),
)
def result(
    job: Job,
    work: Path,
    windows: Windows,
    written: Windows | None,
    search: SearchResult,
    levelled: Levelled | None,
    plan: PruningPlan,
    compensated: Path | None,
    model: Path,
    target: TargetOutcome | None,
    recovered: Path | None,
    *measured: Any,
) -> RunResult:
    """All numbers of a run; the model cards are written too, which show them."""
    perplexities = dict(zip(perplexity, measured[: len(perplexity)], strict=True))
    by_task = dict(zip(scores, measured[len(perplexity) : -len(breakage)], strict=True))
    broken = dict(zip(breakage, measured[-len(breakage) :], strict=True))
    config_after = load_config(find_model(str(model)))
    after = build_structure(empty_model(config_after)).total_parameters
    written_windows = {"self": len(written["compensation"])} if written else {}
    chosen = job.prepared.vocabulary.summary if job.prepared.vocabulary else None
    before = chosen.parameters_before if chosen else plan.total_parameters
    numbers = [
        ModelNumbers(
            role=role,
            parameters=before if role == "dense" else after,
            perplexity=perplexities[role] or {},
            tasks=by_task.get(role) or {},
            breakage=broken.get(role),
            verdict=verdict_of(role, broken),
        )
        for role in roles_of(job.config)
        if role != "compensated" or scales_were_tuned(compensated, model)
    ]
    for each in numbers:
        perplexities_of = {f"perplexity {each.role}/{text}": one.perplexity for text, one in each.perplexity.items()}
        tell(job.prepared.callbacks, perplexities_of)
    result = RunResult(
        config=job.config,
        plan_hash=plan.hash,
        search=search,
        levelled=levelled,
        recovery=read_record(recovered) if recovered else None,
        models=tuple(numbers),
        windows={use: len(each) for use, each in usable(job, windows).items()} | written_windows,
        stages=job.prepared.reporter.finished_stages(job.keys.values()),
        device=describe_device(job.prepared.device),
        vocabulary=chosen,
        foreign=None if chosen else _foreign_vocabulary(job, windows),
        target=target,
    )
    folders: dict[Role, Path | None] = {"searched": model, "recovered": recovered}
    for role, folder in folders.items():
        if folder:
            write_card(folder, model_card(job.prepared.location, config_after, plan, result, role))
    return result


def _foreign_vocabulary(job: Job, windows: Windows) -> ForeignVocabulary:
    """What of the vocabulary is written in scripts that the text has no letter of."""
    prepared, used = job.prepared, torch.cat([each.flatten() for each in windows.values()]).unique().tolist()
    config = prepared.empty.config
    scripts = foreign_tokens(prepared.tokenizer, config.vocab_size, used)
    embeddings = sum(tensor.numel() for tensor in prepared.empty.parameters() if config.vocab_size in tensor.shape[:1])
    share = embeddings / config.vocab_size * sum(scripts.values()) / prepared.structure.total_parameters
    return ForeignVocabulary(tokens=sum(scripts.values()), scripts=list(scripts)[:3], share=share)


@artifact("report.html", PAGE, inputs=(result,))
def report(job: Job, work: Path, result: RunResult) -> str:
    """The page that shows the run."""
    return render_report(job.prepared.folder, job.config)

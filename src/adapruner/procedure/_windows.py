"""The text of a run: windows of tokens for every use."""

from __future__ import annotations

from pathlib import Path

import torch

from adapruner.artifacts import Form, artifact
from adapruner.calibration import EvaluationText, generate_windows, load_texts, save_texts
from adapruner.errors import AdaPrunerError, NonFiniteError
from adapruner.evaluation import losses_by_batch
from adapruner.job import VOCABULARY, Job, needs_moments, window_counts
from adapruner.models import in_fastest_dtype
from adapruner.procedure._forms import TENSORS, Windows, json_form
from adapruner.tokens import Vocabulary

_WRITTEN_AT_ONCE = 64
REPORT_TEXTS: Form[dict[str, EvaluationText]] = Form(save_texts, load_texts)


@artifact(
    VOCABULARY,
    json_form(Vocabulary),
    options="vocabulary_size vocabulary_multiple",
    leaves="model vocabulary_texts",
    check=lambda job: job.prepared.vocabulary,
    is_wanted=lambda config: bool(config.vocabulary),
    is_result=False,
)
def vocabulary(job: Job, work: Path) -> Vocabulary | None:
    """The tokens that are kept. Everything from here on is of the model and the tokenizer with these alone."""
    return job.prepared.vocabulary


@artifact(
    "windows.safetensors",
    TENSORS,
    inputs=(vocabulary,),
    options="pool objective_windows final_windows compensation_windows seq_len seed compensation space",
    leaves="model pool_text objective_text",
    check=lambda job: job.prepared.drawn,
    is_result=False,
    version=2,
)
def windows(job: Job, work: Path, vocabulary: Vocabulary | None) -> Windows:
    """The windows of every use, [windows, tokens] each, int64; the dense model writes those that it is to write."""
    prepared, config = job.prepared, job.config
    windows = dict(prepared.drawn)
    for number, (use, count) in enumerate(window_counts(config).items()):
        if use not in windows:
            with prepared.reporter.stage(f"writing {use}"):
                windows[use] = generate_windows(prepared.dense, count, config.seq_len, 4 * config.seed + number)
    return windows


@artifact(
    "evaluation/texts.safetensors",
    REPORT_TEXTS,
    inputs=(vocabulary,),
    options="evaluate evaluate_windows evaluate_bos seq_len",
    leaves="model report_texts",
    check=lambda job: job.prepared.report,
    is_result=False,
)
def report_texts(job: Job, work: Path, vocabulary: Vocabulary | None) -> dict[str, EvaluationText]:
    """The windows that perplexity is reported on, by the name of their text; kept, so that no text is needed later."""
    return job.prepared.report


@artifact(
    "evaluation/texts-dense.safetensors",
    REPORT_TEXTS,
    options="evaluate evaluate_windows evaluate_bos seq_len",
    leaves="model report_texts",
    check=lambda job: job.prepared.report_given,
    is_wanted=lambda config: bool(config.vocabulary),
    is_result=False,
)
def report_texts_dense(job: Job, work: Path) -> dict[str, EvaluationText]:
    """The same text in the tokens of the given model, where the pruned one has fewer."""
    return job.prepared.report_given


@artifact(
    "self.safetensors",
    TENSORS,
    inputs=(windows,),
    options="self_windows calibration seq_len seed",
    leaves="model precision",
    is_wanted=lambda config: needs_moments(config) and config.self_windows != 0,
    is_result=False,
)
def self_written(job: Job, work: Path, windows: Windows) -> Windows:
    """Windows that the dense model writes for compensation, which is fitted on them as well: text of other kinds than
    that of the calibration dataset. Those on which its loss is not finite are dropped."""
    prepared, config = job.prepared, job.config
    count = prepared.self_windows(len(windows["compensation"]))
    if not count:
        return {"compensation": torch.empty(0, config.seq_len, dtype=torch.int64)}
    with prepared.reporter.stage("writing text", count) as advance:
        number = list(window_counts(config)).index("compensation")
        fast, seed = in_fastest_dtype(prepared.dense), 4 * config.seed + number
        written = generate_windows(fast, count, config.seq_len, seed, _WRITTEN_AT_ONCE, advance)
        finite = torch.cat(list(losses_by_batch(fast, written))).isfinite()
    return {"compensation": written[finite]}


def usable(job: Job, windows: Windows) -> Windows:
    """The windows without those on which the loss of the dense model is not finite."""
    kept = dict(windows)
    for use, numbers in job.prepared.left_out(job.keys).items():
        mask = torch.ones(len(windows[use]), dtype=torch.bool)
        mask[numbers] = False
        kept[use] = windows[use][mask]
    return kept


def leave_out_broken_windows(job: Job, windows: Windows, error: NonFiniteError) -> None:
    """Finds and notes the windows on which the loss of the dense model is not finite.

    Args:
        error: the reason to look.

    Raises:
        NonFiniteError: the same, where no window is to blame.
        AdaPrunerError: the model is to blame, or too few windows are left.
    """
    fast, broken = in_fastest_dtype(job.prepared.dense), {}
    for use in windows:
        finite = torch.cat(list(losses_by_batch(fast, windows[use]))).isfinite()
        numbers = [int(number) for number in torch.nonzero(~finite).flatten()]
        at_least = {"pool": job.config.samples, "objective": 1, "compensation": 2}[use]
        if 2 * len(numbers) > len(finite) or len(finite) - len(numbers) < at_least:
            raise AdaPrunerError(
                f"the loss of the model is not finite on {len(numbers)} of the {len(finite)} windows of the {use}: its"
                " weights are broken or its dtype is too narrow: try `dtype` float32"
            ) from None
        if numbers:
            broken[use] = numbers
    if broken == job.prepared.left_out(job.keys):
        raise error
    for use, numbers in broken.items():
        job.prepared.reporter.note(
            f"left out, because the loss of the model on them is not finite: windows {numbers} of the {use}"
        )
    job.prepared.leave_out(job.keys, broken)

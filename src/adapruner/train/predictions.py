"""The most probable tokens of a teacher on disk, for a teacher that does not fit beside the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.files import write_atomically
from adapruner.base.processes import this_process
from adapruner.model.layers import is_streamed
from adapruner.options import RecoveryOptions
from adapruner.train.examples import IGNORED, Example, Examples, Taught
from adapruner.train.loss import PREDICTIONS_AT_ONCE, Predictor
from adapruner.train.training import collate

# Examples in a file. Layer by layer, they are computed together.
_EXAMPLES = 64


def write_predictions(
    teacher: PreTrainedModel,
    blend: Sequence[Examples],
    options: RecoveryOptions,
    folder: Path,
    progress: Callable[[int], None] = lambda examples: None,
) -> list[Examples]:
    """Writes the most probable tokens of a teacher, which may be streamed or sharded, and their log-probabilities at
    the temperature of the options, for every learnt token of all examples. Processes share the files out; those that
    exist are kept: the examples are the same in every call. Returns the examples with their predictions."""
    files: dict[Path, Sequence[Example]] = {}

    def taught(examples: Sequence[Example]) -> list[Example]:
        placed: list[Example] = []
        for first in range(0, len(examples), _EXAMPLES):
            file = folder / f"{len(files):06}.safetensors"
            files[file] = examples[first : first + _EXAMPLES]
            learnt = [sum(label != IGNORED for label in example["labels"][1:]) for example in files[file]]
            rows = pairwise(accumulate(learnt, initial=0))
            placed += [
                {**example, "taught": Taught(str(file), *row)} for example, row in zip(files[file], rows, strict=True)
            ]
        return placed

    placed = [replace(part, training=taught(part.training), validation=taught(part.validation)) for part in blend]
    _wait()
    missing = [file for file in files if not file.exists()]
    _wait()
    progress(sum(len(examples) for file, examples in files.items() if file not in missing))
    process, predictor = this_process(), Predictor(teacher)
    for first in range(0, len(missing), process.count):
        # All processes run a sharded teacher together: in some, a file is repeated, or has fewer batches.
        file = missing[min(first + process.rank, len(missing) - 1)]
        at_once = _EXAMPLES if is_streamed(teacher) else options.micro_batch_size
        batches = [files[file][begin : begin + at_once] for begin in range(0, _EXAMPLES, at_once)]
        tensors = _most_probable(predictor, batches, options)
        if first + process.rank < len(missing):
            write_atomically(file, partial(save_file, tensors))
        progress(sum(len(files[name]) for name in missing[first : first + process.count]))
    _wait()
    return placed


@torch.no_grad()
def _most_probable(
    teacher: Predictor, batches: Sequence[Sequence[Example]], options: RecoveryOptions
) -> dict[str, Tensor]:
    """[learnt tokens, tokens that are known], int32, and their log-probabilities, float32. For an empty batch, the
    teacher runs the first one again."""
    found = []
    for examples in batches:
        batch = collate(examples or batches[0])
        hidden = teacher.called(batch["input_ids"].to(teacher.device), batch["attention_mask"].to(teacher.device))
        if not examples:
            continue
        learnt = hidden[:, :-1][(batch["labels"][:, 1:] != IGNORED).to(hidden.device)]
        for rows in learnt.split(PREDICTIONS_AT_ONCE):
            predicted = (teacher.logits(rows).float() / options.temperature).log_softmax(-1)
            found.append(predicted.topk(min(options.teacher_top or 1, predicted.shape[-1])))
    return {
        "tokens": torch.cat([top.indices for top in found]).int().cpu(),
        "log_probabilities": torch.cat([top.values for top in found]).cpu(),
    }


def _wait() -> None:
    if this_process().count > 1:
        PartialState().wait_for_everyone()

"""Loading a model, and its size and speed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.config import Dtype
from adapruner.errors import AdaPrunerError
from adapruner.evaluation._speed import Speed, measure_speed
from adapruner.families import open_model
from adapruner.files import write_text
from adapruner.models import _loading
from adapruner.models._architecture import check_length
from adapruner.models._device import resolve_device
from adapruner.models._places import find_model
from adapruner.paths import output_path
from adapruner.progress import Reporter
from adapruner.run.given import ModelGiven
from adapruner.verbs._source import ModelSource


def load(model: str | Path, dtype: Dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Loads a pruned or a dense model, ready to `generate`.

    Args:
        model: hub id, model folder (as in `RUN/model`), `.gguf` file, or `smollm2`.
        dtype: `auto` keeps the dtype of the checkpoint.
        device: `auto` uses the first GPU if there is one, else the CPU; over `cuda:0,cuda:1` the layers are spread.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    return open_model(find_model(str(model)), dtype, device)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Loads the tokenizer of a model.

    Args:
        model: as for `load`.

    Raises:
        AdaPrunerError: there is no such model, or its tokenizer cannot be read.
    """
    return _loading.load_tokenizer(find_model(str(model)))


def benchmark(
    model: ModelGiven,
    against: ModelGiven | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    dtype: Dtype = "auto",
    device: str = "auto",
    output: str | Path | None = None,
) -> dict[str, Speed]:
    """Size and speed of a model, and of a second one on request, measured alternately in this process.

    Args:
        model: as for `load`; or a model in memory, which is measured on its device.
        against: the model to compare with, the dense one as a rule.
        batch_sizes: sequences at once.
        prompt: tokens that are read at once.
        new_tokens: tokens that are then generated one by one.
        repetitions: number of timed runs, after one to warm up; the median is reported.
        output: a file for the result as JSON; `speed.json` in a run folder is shown by the report of the run.

    Returns:
        By the name or path of each model; models in memory are called `against` and `model`.

    Raises:
        AdaPrunerError: an option or a model is invalid; before the weights are loaded.
    """
    if not batch_sizes or min(*batch_sizes, prompt, new_tokens, repetitions) < 1:
        raise AdaPrunerError("`batch_size`, `prompt`, `new_tokens` and `repetitions` must be at least 1")
    written = None if output is None else output_path(output)
    resolve_device(device)
    given = {"against": against, "model": model}
    sources = {
        str(candidate) if isinstance(candidate, str | Path) else role: ModelSource.of(candidate, dtype, device)
        for role, candidate in given.items()
        if candidate is not None
    }
    for source in sources.values():
        check_length(source.config, prompt + new_tokens)
    reporter = Reporter()
    with contextlib.ExitStack() as using:
        loaded = {}
        with reporter.stage("loading", len(sources)) as advance:
            for name, source in sources.items():
                loaded[name] = using.enter_context(source.loaded(dtype, device))
                advance()
        with reporter.stage("measuring", len(loaded) * (len(batch_sizes) * (repetitions + 1) + 1)) as advance:
            speeds = measure_speed(loaded, batch_sizes, prompt, new_tokens, repetitions, advance)
    if written is not None:
        write_text(written, TypeAdapter(dict[str, Speed]).dump_json(speeds, indent=2).decode())
    return speeds

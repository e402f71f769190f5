"""Quality, size and speed of several models, each in several quantizations."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner import report
from adapruner.calibration import EvaluationText, evaluation_text, parse_source
from adapruner.comparison import Comparison, Point
from adapruner.config import Engine, GgufType
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity, Tasks, load_tasks, measure_perplexity, measure_speed, measure_tasks, rate
from adapruner.families import open_config, open_model
from adapruner.files import write_text
from adapruner.gguf import check_gguf, llama_cpp, write_gguf
from adapruner.graph import RunFolder
from adapruner.models import (
    ModelLocation,
    check_length,
    check_tokens,
    empty_model,
    find_model,
    load_tokenizer,
    resolve_device,
)
from adapruner.paths import given_path, output_path
from adapruner.progress import Reporter


@dataclass(frozen=True)
class _Measurement:
    """The settings of the measurements, the same for every model. `source` is the name of the text."""

    source: str
    seq_len: int
    limit: int | None
    prompt: int
    new_tokens: int
    repetitions: int

    @property
    def length(self) -> int:
        """The most tokens that a model reads or writes at once."""
        return max(self.seq_len, self.prompt + self.new_tokens)


@dataclass(frozen=True)
class _Candidate:
    name: str
    location: ModelLocation
    tokenizer: Tokenizer
    text: EvaluationText

    @property
    def file(self) -> Path | None:
        """The GGUF file that the user named; the alias of a model is one too, but means the model."""
        return given_path(self.name) if self.name.endswith(".gguf") else None


def compare(
    models: Sequence[str | Path],
    output: str | Path | None = None,
    perplexity: str = "wikitext2",
    seq_len: int = 128,
    limit: int | None = None,
    types: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    engines: Sequence[Engine] = ("llama.cpp",),
    tasks: str | Sequence[str] = (),
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    overwrite: bool = False,
    device: str = "auto",
) -> Comparison:
    """Measures models, one after the other, and finds those that others dominate.

    Args:
        models: as for `load`, or run folders, which stand for their last model.
        output: an HTML page to write.
        perplexity: the dataset for bits per byte.
        seq_len: tokens per window of this dataset.
        limit: maximum number of windows, and of items of each task, evenly spaced.
        types: types of the GGUF files that llama.cpp runs, as a list or separated by commas; a given `.gguf` file runs
            as it is.
        engines: the libraries that run the models; transformers runs them in their dtype.
        tasks: tasks of lm-eval, run by transformers.
        prompt: tokens that are read at once to measure speed.
        new_tokens: tokens that are then generated one by one.
        repetitions: number of timed runs, after one to warm up; the median is reported.
        overwrite: replace the page.

    Raises:
        AdaPrunerError: a model, the text, a type or an option is invalid; before any weights are loaded.
    """
    page = _checked_page(output, overwrite)
    measurement = _Measurement(perplexity, seq_len, limit, prompt, new_tokens, repetitions)
    gguf_types = _parse_types(types) if "llama.cpp" in engines else []
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check_options(measurement, models, engines, names)
    target = str(resolve_device(device))
    candidates = [_candidate(str(name), measurement, gguf_types) for name in dict.fromkeys(models)]
    to_run = load_tasks(names, limit) if names else None
    points = list[Point]()
    with Reporter().stage("comparing", len(candidates)) as advance:
        for candidate in candidates:
            if "transformers" in engines:
                points.append(_in_transformers(candidate, measurement, to_run, target))
            if "llama.cpp" in engines:
                points += _in_every_type(candidate, measurement, gguf_types, page.parent if page else None)
            advance()
    comparison = Comparison(points=points, prompt=prompt, new_tokens=new_tokens, repetitions=repetitions, device=target)
    if page:
        write_text(page, report.render_comparison(comparison))
    return comparison


def _checked_page(output: str | Path | None, overwrite: bool) -> Path | None:
    if output is None:
        return None
    page = output_path(output)
    if page.exists() and not (overwrite and page.is_file()):
        raise AdaPrunerError(f"{page} exists: choose another output, or `overwrite` to replace a page")
    page.parent.mkdir(parents=True, exist_ok=True)
    return page


def _parse_types(names: Sequence[str]) -> list[GgufType]:
    known: tuple[GgufType, ...] = get_args(GgufType)
    wanted = dict.fromkeys(name.strip() for listed in names for name in listed.split(",") if name.strip())
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise AdaPrunerError(f"`types` must be some of {', '.join(known)}{f', not {unknown[0]}' if unknown else ''}")
    return [name for name in known if name in wanted]


def _check_options(
    measurement: _Measurement, models: Sequence[str | Path], engines: Sequence[Engine], tasks: Sequence[str]
) -> None:
    if not models:
        raise AdaPrunerError("name the models to compare")
    if measurement.seq_len < 2:
        raise AdaPrunerError(f"`seq_len` {measurement.seq_len} is too short: windows need at least 2 tokens")
    counts = (measurement.prompt, measurement.new_tokens, measurement.repetitions)
    if min(counts) < 1 or (measurement.limit is not None and measurement.limit < 1):
        raise AdaPrunerError("`limit`, `prompt`, `new_tokens` and `repetitions` must be at least 1")
    if tasks and "transformers" not in engines:
        raise AdaPrunerError("`tasks` are run by transformers: add it to `engine`")
    if "llama.cpp" in engines:
        llama_cpp.check_installed()


def _candidate(name: str, measurement: _Measurement, gguf_types: Sequence[GgufType]) -> _Candidate:
    """Checks a model, and tokenizes the text for it, without its weights."""
    location = find_model(_last_model(name))
    config, tokenizer = open_config(location), load_tokenizer(location)
    empty = empty_model(config)
    for gguf_type in () if name.endswith(".gguf") else gguf_types:
        check_gguf(empty, gguf_type)
    check_length(empty.config, measurement.length)
    source = parse_source(measurement.source, "report")
    if source.holds_windows:
        raise AdaPrunerError(f"{source} holds windows of tokens, which other models may not have: name a text")
    text = evaluation_text(source, tokenizer, measurement.seq_len, measurement.limit)
    check_tokens(config, int(text.windows.max()))
    if text.predicted_bytes is None:
        raise AdaPrunerError(f"the tokenizer of {name} does not map tokens to text: its bits per byte are not known")
    return _Candidate(name, location, tokenizer, text)


def _last_model(name: str) -> str:
    """The last model of a run folder: the recovered one, if the run has one.

    Raises:
        AdaPrunerError: the run has several ratios, each with a model of its own.
    """
    run = RunFolder(given_path(name))
    # The config of a run with several ratios is in the folder around theirs.
    holders = [folder for folder in (run, run.parent) if folder.config.is_file()] if run.holds_artifacts else []
    config = holders[0].read_config() if holders else None
    if config and holders[0] is run and len(config.ratio) > 1:
        folders = ", ".join(str(run.of_ratio(ratio).path) for ratio in config.ratio)
        raise AdaPrunerError(f"{name} holds a model for each of its ratios: name {folders}")
    # A run without recovery may have replaced one that had it.
    last = [run.model] if config and not config.recover else [run.recovered, run.model]
    return next((str(model) for model in last if (model / "config.json").is_file()), name)


def _in_transformers(candidate: _Candidate, measurement: _Measurement, tasks: Tasks | None, device: str) -> Point:
    model, text = open_model(candidate.location, "auto", device), candidate.text
    counts = measurement.prompt, measurement.new_tokens, measurement.repetitions
    speed = measure_speed({"": model}, (1,), *counts)[""]
    return Point(
        model=candidate.name,
        engine="transformers",
        type=str(model.dtype).removeprefix("torch."),
        size=speed.weight_bytes,
        perplexity=_finite(measure_perplexity(model, text.windows, measurement.source, **text.about), candidate.name),
        prefill=speed.prefill[1],
        decode=speed.decode[1],
        tasks=measure_tasks(model, candidate.tokenizer, tasks) if tasks else [],
    )


def _in_every_type(
    candidate: _Candidate, measurement: _Measurement, gguf_types: Sequence[GgufType], folder: Path | None
) -> Iterator[Point]:
    """The model in llama.cpp, in each type; files are written one at a time, to a temporary folder inside `folder`."""
    if candidate.file:
        yield _in_llama_cpp(candidate.file, "gguf", candidate, measurement)
        return
    model = open_model(candidate.location, "auto", "cpu")
    with tempfile.TemporaryDirectory(prefix=".adapruner-", dir=folder) as scratch:
        for gguf_type in gguf_types:
            file = Path(scratch) / "model.gguf"
            write_gguf(model, candidate.tokenizer, file, gguf_type)
            yield _in_llama_cpp(file, gguf_type, candidate, measurement)


def _in_llama_cpp(file: Path, gguf_type: str, candidate: _Candidate, measurement: _Measurement) -> Point:
    model, text = llama_cpp.LlamaCpp(file, measurement.length), candidate.text
    losses = torch.tensor(list(model.window_losses(text.windows, max(1, text.special_tokens))), dtype=torch.float64)
    perplexity = Perplexity(
        perplexity=float(losses.mean().exp()),
        text=measurement.source,
        seq_len=measurement.seq_len,
        windows=len(losses),
        loss_standard_error=float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None,
        **text.about,
    )
    rounds = [model.seconds(measurement.prompt, measurement.new_tokens) for _ in range(measurement.repetitions + 1)]
    prefill, decode = zip(*rounds[1:], strict=True)
    return Point(
        model=candidate.name,
        engine="llama.cpp",
        type=gguf_type,
        size=file.stat().st_size,
        perplexity=_finite(perplexity, candidate.name),
        prefill=rate(measurement.prompt, prefill),
        decode=rate(measurement.new_tokens, decode),
    )


def _finite(perplexity: Perplexity, name: str) -> Perplexity:
    if math.isnan(perplexity.perplexity):
        raise AdaPrunerError(f"{name} predicts numbers that are NaN: its weights are broken")
    return perplexity

"""The first screen: what was lost, what was gained, whether the numbers can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from adapruner.evaluation import Rate
from adapruner.report._contents import Contents
from adapruner.result import ModelNumbers, is_noise
from adapruner.texts import assign_texts

T = TypeVar("T")

_DID = {"pool": "calibrated on", "objective": "selected on", "recovery": "fine-tuned on"}


@dataclass(frozen=True)
class Number:
    """A number as it is shown, and its standard error."""

    shown: str
    error: str = ""


@dataclass(frozen=True)
class Change:
    """A number of the dense model beside the same of the final one.

    Attributes:
        detail: the text or the tasks.
        numbers: of the dense model, and of the final one.
        is_noise: whether the change is within two standard errors of none.
    """

    label: str
    detail: str
    numbers: tuple[Number, Number]
    change: str
    is_noise: bool = False


def losses(contents: Contents) -> list[Change]:
    """What the dense model does better, as far as it was measured."""
    if not contents.dense or not contents.final:
        return []
    return [*_text_changes(contents), *_task_changes(contents.dense, contents.final), *_breakage_changes(contents)]


def gains(contents: Contents) -> list[Change]:
    """What the final model needs less of."""
    if not contents.dense or not contents.final:
        return []
    before, after = contents.dense.parameters, contents.final.parameters
    changes = [Change("parameters", "", _both(_millions, before, after), _fraction(before, after))]
    if contents.weight_bytes:
        sizes = round(contents.weight_bytes * before / after), contents.weight_bytes
        changes.append(Change("weights on disk", "in the same dtype", _both(_megabytes, *sizes), _fraction(*sizes)))
    return [*changes, *_speed_changes(contents)]


def mean_accuracies(model: ModelNumbers) -> dict[str, tuple[float, float | None]]:
    """Mean accuracies with their standard errors, from those of the tasks, which are independent of each other."""
    means = {}
    for metric, value in model.mean_accuracies.items():
        scores = model.tasks.values()
        errors = [score.standard_errors.get(metric if metric in score.metrics else "acc") for score in scores]
        known = [error for error in errors if error is not None]
        means[metric] = value, math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    return means


def task_differences(contents: Contents) -> dict[tuple[str, str], tuple[float, float | None]]:
    """By task and metric, by how much the final model scores above the dense one, with the standard error."""
    if not contents.dense or not contents.final:
        return {}
    found = {}
    for task, score in contents.final.tasks.items():
        dense = contents.dense.tasks[task]
        for metric, value in score.metrics.items():
            errors = [one.standard_errors.get(metric) for one in (dense, score)]
            known = [error for error in errors if error is not None]
            found[task, metric] = value - dense.metrics[metric], math.hypot(*known) if len(known) == 2 else None
    return found


def facts(contents: Contents) -> dict[str, str]:
    """What the numbers rest on, by what it is about."""
    config, found = contents.config, {}
    texts = contents.final.perplexity if contents.final else {}
    if texts:
        found["Text"] = "; ".join(
            f"{name}: {one.windows:,} windows of {one.seq_len:,} tokens, {one.predicted_tokens:,} predicted"
            for name, one in texts.items()
        )
        used = assign_texts(config, missing_ok=True).used
        read = {use: source for use, source in used.items() if use != "objective" or not config.objective_function}
        uses = ", ".join(f"{_DID[use]} {source}" for use, source in read.items())
        found["Overlap"] = f"{uses}: no document of these is reported on" if uses else "none: the model wrote the text"
    scores = contents.final.tasks.values() if contents.final else ()
    if scores:
        fewest, most = min(score.items for score in scores), max(score.items for score in scores)
        items = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        error = next(iter(mean_accuracies(contents.final).values()), (0.0, None))[1] if contents.final else None
        least = f"; a change of the mean below {2 * math.sqrt(2) * error:.2f} is noise" if error else ""
        found["Tasks"] = f"{items} items a task{least}"
    if contents.result and (target := contents.result.target):
        found["Target"] = (
            f"{target.option.removeprefix('target_')}: asked {target.asked:,.2f} {target.unit}, predicted"
            f" {target.predicted:,.2f}, reached {target.reached:,.2f}"
        )
    seeds = f"{config.seed}" + (f", of the recovery {config.recovery.seed}" if config.recover else "")
    found["Seed"] = f"{seeds}: one run; other seeds give other plans"
    if contents.result:
        versions = ", ".join(f"{name} {version}" for name, version in contents.result.versions.items())
        found["Computed"] = f"on {contents.result.device} with {versions}"
    return found


def duration(seconds: float) -> str:
    """Seconds as they are shown."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _text_changes(contents: Contents) -> Iterator[Change]:
    assert contents.dense
    assert contents.final
    for text, after in contents.final.perplexity.items():
        before = contents.dense.perplexity[text]
        losses = [math.log(one.perplexity) for one in (before, after)]
        noise = is_noise(losses[1] - losses[0], before.loss_standard_error, after.loss_standard_error)
        if before.bits_per_byte and after.bits_per_byte:
            rise = after.bits_per_byte - before.bits_per_byte
            noise = is_noise(rise, before.bits_standard_error, after.bits_standard_error)
            numbers = (
                _with_error(before.bits_per_byte, before.bits_standard_error, 4),
                _with_error(after.bits_per_byte, after.bits_standard_error, 4),
            )
            yield Change("bits per byte", text, numbers, _signed(rise, 4), noise)
        # Perplexities per token are of other tokens where the vocabulary was pruned.
        if not contents.config.vocabulary:
            numbers = (
                _with_error(before.perplexity, before.standard_error, 2),
                _with_error(after.perplexity, after.standard_error, 2),
            )
            yield Change("perplexity", text, numbers, f"× {after.perplexity / before.perplexity:.2f}", noise)


def _task_changes(dense: ModelNumbers, final: ModelNumbers) -> Iterator[Change]:
    means = mean_accuracies(dense)
    for metric, (after, error) in mean_accuracies(final).items():
        before, error_before = means[metric]
        count = len(final.tasks)
        yield Change(
            f"mean {metric}" if count > 1 else metric,
            f"{count} tasks" if count > 1 else next(iter(final.tasks)),
            (_with_error(before, error_before, 3), _with_error(after, error, 3)),
            _signed(after - before, 3),
            is_noise(after - before, error_before, error),
        )


def _breakage_changes(contents: Contents) -> Iterator[Change]:
    """The repetition alone: the rest is in the table of the models."""
    before, after = (model.breakage if model else None for model in (contents.dense, contents.final))
    if before and after and before.repetition is not None and after.repetition is not None:
        numbers = _both("{:.2f}".format, before.repetition, after.repetition)
        yield Change("repetition", "of greedy text", numbers, _signed(after.repetition - before.repetition, 2))


def _speed_changes(contents: Contents) -> Iterator[Change]:
    if contents.speed is None:
        return
    dense, final = contents.speed
    for label, before, after in (
        ("prompt, tokens per second", dense.prefill, final.prefill),
        ("generation, tokens per second", dense.decode, final.decode),
    ):
        for batch in sorted(before.keys() & after.keys()):
            yield _rate_change(label, batch, before[batch], after[batch])
    if dense.peak_memory_bytes and final.peak_memory_bytes:
        peaks = dense.peak_memory_bytes, final.peak_memory_bytes
        yield Change("peak memory", f"batch {max(dense.prefill)}", _both(_megabytes, *peaks), _fraction(*peaks))


def _rate_change(label: str, batch: int, before: Rate, after: Rate) -> Change:
    """Noise where the slowest and fastest repetitions of the two overlap."""
    overlap = before.least <= after.greatest and after.least <= before.greatest
    change = f"× {after.median / before.median:.2f}"
    return Change(label, f"batch {batch}", (_rate(before), _rate(after)), change, overlap)


def _rate(rate: Rate) -> Number:
    return Number(f"{rate.median:,.0f}", f"{rate.least:,.0f}–{rate.greatest:,.0f}")


def _both(show: Callable[[T], str], before: T, after: T) -> tuple[Number, Number]:
    return Number(show(before)), Number(show(after))


def _with_error(value: float, error: float | None, digits: int) -> Number:
    return Number(f"{value:,.{digits}f}", "" if error is None else f"± {error:,.{digits}f}")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _fraction(before: int, after: int) -> str:
    return f"{100 * after / before - 100:+.1f} %".replace("-", "−")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"

"""Size and speed of one model, or of two in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapruner.config import Dtype
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Speed, measure_speed
from adapruner.models import check_length, empty_model, find_model, load_config, load_model, resolve_device
from adapruner.progress import Reporter


def benchmark(
    model: str | Path,
    against: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Speed]:
    """Size and speed of a model, and of another one beside it, measured in turn in this process.

    Args:
        model: as for `load`.
        against: the model to compare with, the dense one as a rule.
        batch_sizes: sequences at once.
        prompt: tokens that are read at once.
        new_tokens: tokens that are then generated one by one.
        repetitions: of which the median is taken, after one that does not count.

    Raises:
        AdaPrunerError: an option or a model is invalid; before the weights are loaded.
    """
    if not batch_sizes or min(*batch_sizes, prompt, new_tokens, repetitions) < 1:
        raise AdaPrunerError("`batch_size`, `prompt`, `new_tokens` and `repetitions` must be at least 1")
    resolve_device(device)
    locations = {str(name): find_model(str(name)) for name in (against, model) if name is not None}
    for location in locations.values():
        check_length(empty_model(load_config(location)).config, prompt + new_tokens)
    reporter = Reporter()
    with reporter.stage("loading", len(locations)) as advance:
        loaded = {}
        for name, location in locations.items():
            loaded[name] = load_model(location, dtype, device)
            advance()
    with reporter.stage("measuring", len(loaded) * (len(batch_sizes) * (repetitions + 1) + 1)) as advance:
        return measure_speed(loaded, batch_sizes, prompt, new_tokens, repetitions, advance)

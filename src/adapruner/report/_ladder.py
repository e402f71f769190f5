"""From a fixed metric to the saved model, one change at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from adapruner.evaluation import Perplexity
from adapruner.report._contents import Contents
from adapruner.result import Role, is_noise
from adapruner.search import KeptPart, Levelled, MovedChannels

_STEPS = {
    "fixed metric": "same metric, compensated",
    "starting point": "best starting point",
    "searched": "best point of the search",
}
_KEPT = {
    "attention": "attention of layer {} kept",
    "feed-forward": "feed-forward of layer {} kept",
    "layer": "layer {} kept",
}


@dataclass(frozen=True)
class Rung:
    """One step up.

    Attributes:
        trial: its number, where it is a trial.
        loss: on held-out windows, in nats per token.
        gain: by how much the loss is below that of the rung before, on the same windows; None where the two were not
            measured on the same windows.
        standard_error: of the gain, window by window.
        measured: on the text that is reported on.
    """

    name: str
    trial: int | None = None
    loss: float | None = None
    gain: float | None = None
    standard_error: float | None = None
    measured: Perplexity | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the gain is within two standard errors of none."""
        return self.gain is not None and is_noise(self.gain, self.standard_error)


def ladder(contents: Contents) -> list[Rung]:
    """The rungs that are known of a run; empty before its search has ended."""
    return list(_rungs(contents)) if contents.search else []


def _rungs(contents: Contents) -> Iterator[Rung]:
    search, measured = contents.search, _measured(contents)
    assert search is not None
    is_compensated = contents.config.compensation != "none"
    if is_compensated:
        name = f"best fixed metric ({search.best_fixed_name}), not compensated"
        yield Rung(name, measured=measured.get("best_fixed"))
    for step in search.steps:
        is_as_measured = step.name == "fixed metric" and not is_compensated
        name = f"best fixed metric ({search.best_fixed_name})" if is_as_measured else _STEPS[step.name]
        text = measured.get("best_fixed") if is_as_measured else None
        yield Rung(name, step.trial, step.loss, step.gain, step.standard_error, text)
    if contents.levelled:
        yield from _levelling_rungs(contents.levelled)
    if "compensated" in measured:
        yield Rung("final compensation", measured=measured["compensated"])
        yield Rung("scales tuned, saved", measured=measured.get("searched"))
    else:
        yield Rung("final compensation, saved" if is_compensated else "saved", measured=measured.get("searched"))
    if contents.config.recover:
        yield Rung("recovered", measured=measured.get("recovered"))
    yield Rung("dense, to compare with", measured=measured.get("dense"))


def _levelling_rungs(levelled: Levelled) -> Iterator[Rung]:
    numbers = Counter[str]()
    for one in (*levelled.kept, *levelled.moves):
        if isinstance(one, KeptPart):
            name = _KEPT[one.part].format(one.layer)
        else:
            kind = "widths levelled" if isinstance(one, MovedChannels) else "heads moved"
            numbers[kind] += 1
            name = f"{kind}, round {numbers[kind]}"
        taken = "" if one.accepted else ", not taken"
        yield Rung(f"{name}{taken}", gain=one.gain, standard_error=one.gain_standard_error)


def _measured(contents: Contents) -> dict[Role, Perplexity]:
    """The first text of every model that has one."""
    return {model.role: next(iter(model.perplexity.values())) for model in contents.models if model.perplexity}

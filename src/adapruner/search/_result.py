"""The outcome of a search: its best trials are judged further, and one of them is chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter

from optuna.trial import FrozenTrial
from torch import Tensor

from adapruner.errors import AdaPrunerError
from adapruner.search._history import LOSSES, STOPPED, History, Step, StepName, compare, loss_of
from adapruner.search._space import FIXED_METRIC, START, Candidate, SearchSpace

Judge = Callable[[Candidate], Iterable[Tensor]]

# Number of best trials that are judged further, in addition to the best fixed metric and the best starting point.
_FINALISTS = 3


class SearchResult(History, frozen=True):
    """The outcome of a search, with all finished trials.

    Attributes:
        ratio: of all parameters, to be removed.
        trials: number of trials that were to be finished.
        best: the best of the candidates that were not stopped; where finalists were judged further, the best of those.
        best_loss: on the windows on which it was last judged; so is `best_fixed_loss`.
        best_trial: its number among `points`.
        best_fixed: the best of LLM-Pruner's metrics on the first random draw of samples.
        best_fixed_name: of that metric.
        stopped_early: number of trials that were stopped early.
        starting_points: number of points that the space tries before it searches.
        steps: the best trial of each kind, picked on the windows of the search, and its gain over the kind before.
            Kinds whose trials were all stopped are missing. `best` may be another trial.
    """

    ratio: float
    trials: int
    best: Candidate
    best_loss: float
    best_trial: int
    best_fixed: Candidate
    best_fixed_loss: float
    best_fixed_name: str
    stopped_early: int
    starting_points: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class _Contender:
    """A trial that was not stopped. Its candidate is judged on further windows when those losses are first read.

    Attributes:
        number: its place among the finished trials.
    """

    trial: FrozenTrial
    number: int
    space: SearchSpace
    judge_further: Judge | None

    @property
    def loss(self) -> float:
        """The loss on the windows of the search."""
        return loss_of(self.trial)

    @property
    def losses(self) -> list[float]:
        """The loss on each window of the search; empty if the loss is not finite."""
        return list(self.trial.user_attrs[LOSSES])

    @property
    def is_start(self) -> bool:
        return START in self.trial.user_attrs

    @property
    def fixed_metric(self) -> str | None:
        return self.trial.user_attrs.get(FIXED_METRIC)

    @cached_property
    def candidate(self) -> Candidate:
        return self.space.suggest(self.trial)

    @cached_property
    def further(self) -> list[float]:
        """The loss on each further window."""
        batches = self.judge_further(self.candidate) if self.judge_further and math.isfinite(self.loss) else []
        return [loss for batch in batches for loss in batch.tolist()]

    @property
    def final_loss(self) -> float:
        """The mean loss over the windows of the search and the further ones together."""
        return statistics.fmean([*self.losses, *self.further] or [math.inf])


def choose(
    finished: Sequence[FrozenTrial], space: SearchSpace, trials: int, judge_further: Judge | None = None
) -> SearchResult:
    """The best of the finished trials, judged on further windows.

    Args:
        finished: in the order in which they were begun.
        trials: number of trials that were to be finished.
        judge_further: gives the losses of a candidate, batch by batch, as the judge of the search does, but on further
            windows. The best of many trials owes part of its loss to the windows it was chosen on; None accepts that.

    Raises:
        AdaPrunerError: no trial ended with a finite loss.
    """
    contenders = [
        _Contender(trial, number, space, judge_further)
        for number, trial in enumerate(finished)
        if STOPPED not in trial.user_attrs
    ]
    contenders.sort(key=attrgetter("loss"))
    fixed = [contender for contender in contenders if contender.fixed_metric]
    starts = [contender for contender in contenders if contender.is_start]
    if not fixed or not math.isfinite(contenders[0].loss):
        raise AdaPrunerError(
            f"none of the {len(finished)} trials has a finite loss: lower `ratio`, or try `dtype` float32"
        )
    first = islice(_distinct(contenders), _FINALISTS if judge_further else 1)
    # The best fixed metric is judged further to compare with, and so is the best starting point.
    best = min(_distinct([fixed[0], starts[0], *first]), key=attrgetter("final_loss"))
    return SearchResult.of(
        finished,
        ratio=space.budget.ratio,
        trials=trials,
        best=best.candidate,
        best_loss=best.final_loss,
        best_trial=best.number,
        best_fixed=fixed[0].candidate,
        best_fixed_loss=fixed[0].final_loss,
        best_fixed_name=fixed[0].fixed_metric,
        stopped_early=len(finished) - len(contenders),
        starting_points=len(space.starting_points()),
        steps=tuple(_steps(contenders)),
    )


def _distinct(contenders: Iterable[_Contender]) -> Iterator[_Contender]:
    """The contenders whose candidates differ from those before."""
    seen: set[str] = set()
    for contender in contenders:
        if (name := contender.candidate.model_dump_json()) not in seen:
            seen.add(name)
            yield contender


def _steps(contenders: Sequence[_Contender]) -> Iterator[Step]:
    """The worth of each part of a search: the best contender of each kind.

    Args:
        contenders: the best first.
    """
    kinds: dict[StepName, list[_Contender]] = {
        "fixed metric": [contender for contender in contenders if contender.fixed_metric],
        "starting point": [contender for contender in contenders if contender.is_start and not contender.fixed_metric],
        "searched": [contender for contender in contenders if not contender.is_start],
    }
    before: list[float] = []
    for name, (best, *_) in ((name, ranked) for name, ranked in kinds.items() if ranked):
        losses = best.further or best.losses
        if not losses or not all(map(math.isfinite, losses)):
            continue
        gain, standard_error = compare(before, losses) if before else (None, math.inf)
        yield Step(
            name=name,
            trial=best.number,
            candidate=best.candidate,
            loss=statistics.fmean(losses),
            windows=len(losses),
            is_held_out=bool(best.further),
            gain=gain,
            standard_error=standard_error if math.isfinite(standard_error) else None,
        )
        before = losses

"""Proposals near the best trials so far."""

from __future__ import annotations

import math
import random
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

# How many trials count as the best, how likely a parameter is to be changed, and the standard deviation of a change as
# a share of the range (see docs/benchmarks.md).
_BEST, _CHANGED, _DEVIATION = 3, 0.2, 0.12


class MutationSampler(BaseSampler):
    """Proposes one of the three best trials with a few of its parameters changed, as evolutionary search does.

    TPE draws all parameters anew around several good trials. With twenty parameters and few trials, hardly one of those
    proposals is near a good trial in all of them.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._random, self._anew = random.Random(seed), RandomSampler(seed)
        self._parent: dict[str, Any] = {}
        self._changed: set[str] = set()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Draws the parent, and which of its parameters change: at least one."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # Trials of the same loss differ in what changes nothing.
        able = {one.values[0]: one for one in finished if one.params and math.isfinite(one.values[0])}
        best = [able[loss] for loss in sorted(able)[:_BEST]]
        self._parent = self._random.choice(best).params if best else {}
        names = sorted(self._parent)
        self._changed = {name for name in names if self._random.random() < _CHANGED}
        if names and not self._changed:
            self._changed = {self._random.choice(names)}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: every parameter is drawn by itself."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, as no parameters are drawn together."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of the parent, or near it where it changes; any other choice, or any value where the parent has
        none."""
        value = self._parent.get(param_name)
        if value is None:
            return self._anew.sample_independent(study, trial, param_name, param_distribution)
        if param_name not in self._changed:
            return value
        if not isinstance(param_distribution, FloatDistribution | IntDistribution):
            return self._anew.sample_independent(study, trial, param_name, param_distribution)
        low, high = param_distribution.low, param_distribution.high
        step = self._random.gauss(0.0, _DEVIATION) * (high - low)
        if isinstance(param_distribution, IntDistribution):
            step = round(step) or (1 if step > 0 else -1)
        # Reflected at the ends, where many parameters of the starting points are: half of the changes would be lost.
        changed = low + abs(value + step - low)
        return max(low, high - abs(high - changed))

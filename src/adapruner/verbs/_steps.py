"""The steps of a run after measuring, one by one and in memory: score, cut, compensate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import draw_windows
from adapruner.errors import AdaPrunerError
from adapruner.importance._metric import LLM_PRUNER_METRICS, MetricPoint, score_groups
from adapruner.measurement._moments import measure_moments
from adapruner.measurement._statistics import Statistics
from adapruner.models._device import in_fastest_dtype
from adapruner.planning._plan import PruningPlan
from adapruner.structure._blocks import Structure
from adapruner.surgery._cut import prune_model


def make_windows(
    documents: Iterable[str], tokenizer: Tokenizer, count: int = 64, seq_len: int = 128, seed: int = 0
) -> Tensor:
    """Windows of tokens from one or several documents: the beginnings, in random order, then the rest of long ones.

    Args:
        count: number of windows.
        seq_len: tokens per window.

    Returns:
        [count, seq_len], int64; the same for the same seed.

    Raises:
        AdaPrunerError: there is too little text.
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    return draw_windows(documents, tokenizer, count, seq_len, seed)


def score(
    statistics: Statistics, structure: Structure, metric: str | Mapping[str, float] | MetricPoint = "param_first"
) -> Tensor:
    """The importance of every group: every head, channel or expert.

    Args:
        metric: a metric of LLM-Pruner by name (`vectorize`, `param_first`, `param_second`, `param_mix`), weights of
            importance terms by name, or a `MetricPoint`.

    Returns:
        [groups], float64, in the order of `structure.blocks`; larger is more important. Scores of your own have this
        shape: `scores.split([block.groups for block in structure.blocks])` gives the scores of each block.
        `PruningPlan.from_scores` makes a plan of them.

    Raises:
        AdaPrunerError: there is no such metric, or a term needs statistics that were not measured.
    """
    if isinstance(metric, str):
        if metric not in LLM_PRUNER_METRICS:
            raise AdaPrunerError(f"no metric {metric!r}: expected {', '.join(LLM_PRUNER_METRICS)}, or weights of terms")
        metric = LLM_PRUNER_METRICS[metric]
    point = metric if isinstance(metric, MetricPoint) else MetricPoint(weights=dict(metric))
    return score_groups(statistics, structure, point)


def cut(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """A new, smaller model without the groups that the plan removes.

    Weights from which nothing is removed are shared with the given model, which is not changed. Save it with its
    tokenizer by `checkpoint.save_checkpoint`, or by `save_pretrained` if all layers have the same sizes.

    Raises:
        AdaPrunerError: the plan is for another model.
    """
    return prune_model(model, structure, plan)


def compensate(model: PreTrainedModel, structure: Structure, plan: PruningPlan, windows: Tensor) -> PreTrainedModel:
    """The model that `cut` gives, with the remaining weights of the output projections corrected in closed form.

    Args:
        model: the dense model, which is not changed.
        windows: [windows, tokens], int64, at least 2; more text gives a better model.

    Raises:
        AdaPrunerError: the plan is for another model, or there are fewer than two windows.
        NonFiniteError: activations are not finite.
    """
    moments = dict(measure_moments(in_fastest_dtype(model), structure, windows))
    return prune_model(model, structure, plan, moments)

"""What a trial costs the model: from a candidate to a plan, a cut model, and its loss on held-out windows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import window_losses
from adapruner.importance import score_groups
from adapruner.measurement import Statistics
from adapruner.planning import PruningPlan, make_plan
from adapruner.search._space import Candidate
from adapruner.structure import Structure
from adapruner.surgery import prune_model


def plan_candidate(
    structure: Structure, statistics: Statistics, counts: Sequence[int], candidate: Candidate
) -> PruningPlan:
    """The plan that a candidate leads to.

    Args:
        statistics: of the whole pool.
        counts: how many groups every block keeps (`planning.kept_counts`).
    """
    scores = score_groups(statistics.select(candidate.samples), structure, candidate.point)
    return make_plan(structure, scores, counts)


@dataclass(frozen=True)
class Objective:
    """The loss in nats per token that a candidate leaves; no trial does a backward pass.

    Attributes:
        counts: how many groups every block keeps (`planning.kept_counts`).
        windows: [windows, tokens], int64, disjoint from the pool and from everything that is reported.
    """

    model: PreTrainedModel
    structure: Structure
    statistics: Statistics
    counts: Sequence[int]
    windows: Tensor

    def __call__(self, candidate: Candidate) -> float:
        """The mean loss of the model cut by the candidate's plan; infinite where it is not a number."""
        plan = plan_candidate(self.structure, self.statistics, self.counts, candidate)
        pruned = prune_model(self.model, self.structure, plan)
        loss = float(window_losses(pruned, self.windows).mean())
        return loss if loss == loss else float("inf")


def in_fastest_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a bfloat16 copy where the processor multiplies that natively
    (about three times as fast on a CPU with AVX-512 bfloat16).

    Trials only have to be told apart; plans are cut out of the original weights.
    """
    if model.device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if model.dtype != torch.float32 or not native:
        return model
    duplicate: Any = copy.deepcopy(model)
    converted: PreTrainedModel = duplicate.to(torch.bfloat16)
    return converted

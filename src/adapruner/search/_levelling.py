"""Levelling: parts that were removed whole are tried again, and widths move from layers whose channels cost little to
layers whose channels cost much."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation import compute_prefix, log_probabilities, losses_by_batch
from adapruner.models import Whole
from adapruner.planning import Budget, kept_counts, make_plan
from adapruner.search._objective import Objective, scores_of
from adapruner.search._space import Candidate
from adapruner.structure import Block
from adapruner.surgery import kept_layers, prune_model

# What a layer gives up more to see what its channels are worth, as a share of those it keeps: less drowns in noise.
_PROBED_SHARE = 0.15
# A layer whose channels cost twice the mean gets 2 ** 0.4 times as many, and none more than 1.3 times or less than
# 1 / 1.3 times in a round.
_EXPONENT, _MOST_PER_ROUND = 0.4, 1.3
# Channels that cost nothing, or less: measured costs are noisy.
_LEAST_COST = 0.05
# A part is kept for a gain of so many standard errors: of several that are tried, one gains by chance.
_CERTAIN = 2.0


class KeptPart(BaseModel):
    """What it gains to keep a part that the search removed whole, at the same budget.

    Attributes:
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than twice that, and the part was kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    part: Whole
    gain: float
    gain_standard_error: float | None
    accepted: bool


class LevellingRound(BaseModel):
    """What one round has measured and changed.

    Attributes:
        costs: by layer, what its next channels to go would cost: nats of divergence from the dense model per predicted
            token and million parameters.
        standard_errors: of these, over the windows.
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than that, and the widths were changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: dict[int, float]
    standard_errors: dict[int, float]
    gain: float
    gain_standard_error: float | None
    accepted: bool


class Levelled(BaseModel):
    """A candidate with its widths levelled.

    Attributes:
        candidate: the one of the search where nothing was accepted.
        rounds: those that were made; the last may not have been accepted.
        kept: what was tried before them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate: Candidate
    rounds: tuple[LevellingRound, ...]
    kept: tuple[KeptPart, ...] = ()


def level(
    objective: Objective,
    windows: Tensor,
    candidate: Candidate,
    rounds: int,
    meet: Callable[[Candidate], Candidate | None],
    progress: Callable[[int], None] | None = None,
) -> Levelled:
    """Keeps parts that the search had better not removed whole, and moves channels between layers until none costs more
    than another, as far as can be told.

    A search of few trials tries few numbers of whole parts. So each part that is gone is tried again, one after the
    other, with narrower layers to make up for it.

    At the best allocation, the channels that would be removed next cost the same per parameter in every layer. In each
    round, that cost is measured at the present widths, layer by layer: the pruned and compensated model, with the layer
    yet narrower, against the dense one. All layers are then changed at once, by a part of what the costs say, which
    averages out the noise that accepting the best single moves picks up. The windows that costs are measured on are
    not those that decide whether a round is accepted.

    Args:
        objective: what decides; its windows are judged by the loss.
        windows: [windows, tokens], int64, to measure costs on.
        rounds: at most so many; the first that gains nothing is the last.
        meet: gives a candidate the ratio that meets the budget or a target; None if its allocation cannot.
        progress: called with 1 after every measured layer.
    """
    best = _losses(objective, candidate)
    if best is None:
        return Levelled(candidate=candidate, rounds=())
    candidate, best, kept = _keep_parts(objective, candidate, best, meet)
    references = log_probabilities(objective.model, windows)
    made: list[LevellingRound] = []
    for _ in range(rounds):
        measured = dict(_costs(objective, windows, references, candidate, progress))
        moved = _moved(objective, candidate, measured, meet)
        losses = _losses(objective, moved) if moved else None
        if not moved or not losses:
            break
        gain, error = _gain(best, losses)
        made.append(
            LevellingRound(
                costs={layer: cost for layer, (cost, _) in measured.items()},
                standard_errors={layer: deviation for layer, (_, deviation) in measured.items()},
                gain=gain,
                gain_standard_error=error,
                accepted=gain > (error or 0.0),
            )
        )
        if not made[-1].accepted:
            break
        candidate, best = moved, losses
    return Levelled(candidate=candidate, rounds=tuple(made), kept=tuple(kept))


def _keep_parts(
    objective: Objective, candidate: Candidate, best: list[float], meet: Callable[[Candidate], Candidate | None]
) -> tuple[Candidate, list[float], list[KeptPart]]:
    """The candidate without removing what is worth more than the widths that pay for it, its losses on the windows of
    the objective, and what was tried.

    Args:
        best: the losses of the candidate as it is.
    """
    kept: list[KeptPart] = []
    for layer, part in _removed_whole(candidate.budget):
        changed = meet(candidate.model_copy(update={"budget": _keeping(candidate.budget, layer)}))
        losses = _losses(objective, changed) if changed else None
        if not changed or not losses:
            continue
        gain, error = _gain(best, losses)
        accepted = gain > _CERTAIN * (error or 0.0)
        kept.append(KeptPart(layer=layer, part=part, gain=gain, gain_standard_error=error, accepted=accepted))
        if accepted:
            candidate, best = changed, losses
    return candidate, best, kept


def _losses(objective: Objective, candidate: Candidate) -> list[float] | None:
    """None where one of them is not finite."""
    losses = [loss for batch in objective(candidate) for loss in batch.tolist()]
    return losses if all(map(math.isfinite, losses)) else None


def _gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """By how much the loss fell, with the standard error of the differences window by window."""
    gains = [one - other for one, other in zip(before, after, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None


def _removed_whole(budget: Budget) -> list[tuple[int, Whole]]:
    """Layer by layer, what is removed whole of it."""
    attentions, feed_forwards = set(budget.without_attention), set(budget.without_feed_forward)
    parts: dict[int, Whole] = dict.fromkeys(attentions, "attention")
    parts.update(dict.fromkeys(feed_forwards, "feed-forward"))
    parts.update(dict.fromkeys(attentions & feed_forwards, "layer"))
    return sorted(parts.items())


def _keeping(budget: Budget, layer: int) -> Budget:
    """The budget without whole parts removed from a layer."""
    return replace(
        budget,
        without_attention=tuple(one for one in budget.without_attention if one != layer),
        without_feed_forward=tuple(one for one in budget.without_feed_forward if one != layer),
    )


def _levelled_blocks(objective: Objective) -> dict[int, Block]:
    return {
        number: block
        for number, block in enumerate(objective.structure.blocks)
        if block.kind == "channels" and not block.experts
    }


def _costs(
    objective: Objective,
    windows: Tensor,
    references: list[Tensor],
    candidate: Candidate,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[int, tuple[float, float]]]:
    """By layer, the cost of its next channels and the standard error of that (see `LevellingRound`)."""
    structure = objective.structure
    scores = scores_of(structure, objective.statistics, candidate)
    counts = kept_counts(structure, candidate.budget, scores)
    plan = make_plan(structure, scores, counts)
    layers = kept_layers(structure, plan)
    present = prune_model(objective.model, structure, plan, objective.compensation)
    prefix = compute_prefix(present, windows, len(layers))
    before = torch.cat(list(losses_by_batch(present, windows, references, prefix=prefix, prefix_layers=len(layers))))
    whole = [block.groups for block in structure.blocks]
    for number, block in _levelled_blocks(objective).items():
        step = candidate.budget.round_to * block.strata
        fewer = counts[number] - step * max(1, round(_PROBED_SHARE * counts[number] / step))
        if fewer >= max(1, block.least):
            alone = make_plan(structure, scores, [*whole[:number], fewer, *whole[number + 1 :]])
            narrower = prune_model(objective.model, structure, alone, objective.compensation)
            same = layers.index(block.layer)
            with _in_place(present, narrower, block, same):
                after = torch.cat(
                    list(losses_by_batch(present, windows, references, prefix=prefix, prefix_layers=same))
                )
            millions = (counts[number] - fewer) * block.parameters_per_group / 1e6
            added = (after - before) / millions
            if len(added) > 1 and added.isfinite().all():
                yield block.layer, (float(added.mean()), float(added.std() / math.sqrt(len(added))))
        if progress:
            progress(1)


@contextlib.contextmanager
def _in_place(model: PreTrainedModel, other: PreTrainedModel, block: Block, layer: int) -> Iterator[None]:
    """While it lasts, the projections of a block are those of another model, which has all layers.

    Args:
        layer: which of the layers of the first model it is.
    """
    paths = {name.rpartition(".")[0] for name in block.slices_by_parameter}
    own = {path: path.replace(f".{block.layer}.", f".{layer}.", 1) for path in paths}
    before = {path: model.get_submodule(own[path]) for path in paths}
    try:
        for path in paths:
            model.set_submodule(own[path], other.get_submodule(path))
        yield
    finally:
        for path in paths:
            model.set_submodule(own[path], before[path])


def _moved(
    objective: Objective,
    candidate: Candidate,
    measured: dict[int, tuple[float, float]],
    meet: Callable[[Candidate], Candidate | None],
) -> Candidate | None:
    """The candidate with every layer changed by a part of what the costs say; None where they cannot be told apart, the
    budget cannot be met so, or heads and channels are ranked together."""
    structure = objective.structure
    counts = kept_counts(structure, candidate.budget, scores_of(structure, objective.statistics, candidate))
    factors = _factors(measured)
    shares = [0.0] * structure.layers
    for number, block in _levelled_blocks(objective).items():
        if not candidate.budget.removes_whole(block):
            shares[block.layer] = 1 - min(1.0, counts[number] / block.groups * factors.get(block.layer, 1.0))
    # Heads that are ranked with the channels have no share of their own.
    ranks_heads = candidate.budget.ranking == "global" and candidate.budget.head_share > 0
    if not factors or not any(shares) or ranks_heads:
        return None
    changed = meet(candidate.model_copy(update={"budget": replace(candidate.budget, shares=tuple(shares))}))
    return changed if changed and kept_counts(structure, changed.budget) != counts else None


def _factors(measured: dict[int, tuple[float, float]]) -> dict[int, float]:
    """By layer, how many times as many channels it gets. Costs are drawn towards their mean by what of their variance
    is noise."""
    if len(measured) < 2:
        return {}
    costs = [cost for cost, _ in measured.values()]
    mean = statistics.fmean(costs)
    noise = statistics.fmean(error**2 for _, error in measured.values())
    signal = max(0.0, statistics.pvariance(costs) - noise)
    if mean <= 0 or not signal:
        return {}
    return {
        layer: min(_MOST_PER_ROUND, max(1 / _MOST_PER_ROUND, _relative(cost, error, mean, signal) ** _EXPONENT))
        for layer, (cost, error) in measured.items()
    }


def _relative(cost: float, error: float, mean: float, signal: float) -> float:
    drawn = mean + (cost - mean) * signal / (signal + error**2)
    return max(_LEAST_COST, drawn / mean)

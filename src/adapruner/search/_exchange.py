"""Exchange: within each layer, kept channels give way to removed ones that the predictions of the model need more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as functional
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from adapruner.measurement import InputMoments, inverse_damped
from adapruner.planning import PruningPlan
from adapruner.search._objective import Objective, finite_losses, paired_gain
from adapruner.structure import Block
from adapruner.surgery import kept_layers, prune_model

# Whose activations are in memory at once.
LEARNT_AT_ONCE = 4
# What is measured on each of so many parts of the text tells signal from noise.
_PARTS = 16
# Of the channels of a layer, so many are exchanged in a round, or one: what is measured holds for a small change.
_SHARE = 0.01
# Of channels that say so much of each other, the square of their correlation, one alone is exchanged.
_MOST_SHARED = 0.25


class ExchangeRound(BaseModel):
    """What one round has exchanged.

    Attributes:
        exchanged: how many channels are kept in place of as many others.
        predicted: by how much the divergence from the dense model should fall, in nats per predicted token, if every
            exchange counted as if it were the only one.
        gain: by how much the loss on the windows of the objective fell, in nats per predicted token.
        gain_standard_error: from the differences window by window; None where there is but one.
        accepted: whether the gain is more than that, and the channels were exchanged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exchanged: int
    predicted: float
    gain: float
    gain_standard_error: float | None
    accepted: bool


class Exchanged(BaseModel):
    """A plan with channels exchanged.

    Attributes:
        plan: the given one where nothing was accepted.
        rounds: those that were made; the last may not have been accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: PruningPlan
    rounds: tuple[ExchangeRound, ...] = ()


def exchange(
    objective: Objective,
    plan: PruningPlan,
    windows: Tensor,
    rounds: int,
    progress: Callable[[int], None] | None = None,
) -> Exchanged:
    """Exchanges channels within the layers of a plan, each layer keeping as many as before, until that gains nothing.

    Importance is measured on the dense model, and for each layer as if the others were whole. Here it is measured on
    the pruned and compensated model: by how much would its predictions come nearer to those of the dense model if one
    more channel were kept, or one less, with the other weights compensated in both cases? With the gradient G of the
    divergence to the compensated weights W', one backward pass tells it for all channels to second order: a change D
    changes the divergence by ⟨G, D⟩ + c/2 · tr(D H Dᵀ), where D follows from the second moments H. The curvature c of a
    layer is the one at which keeping its removed channels would gain as much as the gradient says, all together. Kept
    channels of the least cost are exchanged for removed ones of the largest gain, as long as the gain is more than the
    cost. (Gates under a hard budget, GRASPrune, arXiv 2604.19398, follow the gradient alone, over many small steps.)

    Args:
        objective: its compensation is by least squares, and its windows decide whether a round is accepted.
        windows: [windows, tokens], int64, to measure on.
        rounds: at most so many; the first that gains nothing is the last.
        progress: called with 1 after every measured batch.
    """
    made: list[ExchangeRound] = []
    best = finite_losses(objective.of_plan(plan))
    # On less, nothing tells signal from noise.
    while best and len(made) < rounds and len(windows) > 1:
        changed, predicted = _exchanged(objective, plan, windows, progress)
        exchanged = sum(len({*new.kept} - {*old.kept}) for new, old in zip(changed.blocks, plan.blocks, strict=True))
        losses = finite_losses(objective.of_plan(changed)) if exchanged else None
        if not losses:
            break
        gain, error = paired_gain(best, losses)
        made.append(
            ExchangeRound(
                exchanged=exchanged,
                predicted=predicted,
                gain=gain,
                gain_standard_error=error,
                accepted=gain > (error or 0.0),
            )
        )
        if not made[-1].accepted:
            break
        plan, best = changed, losses
    return Exchanged(plan=plan, rounds=tuple(made))


def batches_of_round(windows: int) -> int:
    """How often `exchange` calls its progress in a round."""
    return sum(math.ceil(len(part) / LEARNT_AT_ONCE) for part in _parts(torch.empty(windows)))


def _parts(windows: Tensor) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = windows.tensor_split(min(_PARTS, len(windows)))
    return parts


def _exchanged(
    objective: Objective, plan: PruningPlan, windows: Tensor, progress: Callable[[int], None] | None
) -> tuple[PruningPlan, float]:
    """The plan after one round, and what that should gain; see `ExchangeRound`."""
    model, structure = objective.model, objective.structure
    channels = _channels(objective, plan)
    if not channels:
        return plan, 0.0
    whole = [range(own.groups) if number in channels else own.kept for number, own in enumerate(plan.blocks)]
    wide = prune_model(model, structure, PruningPlan.of(structure, whole), objective.compensation).requires_grad_(False)
    weights = {own.name: own.compensated() for own in channels.values()}
    slopes: dict[int, list[Tensor]] = {number: [] for number in channels}
    for part in _parts(windows):
        gradients = _gradients(model, wide, weights, part, progress)
        for number, own in channels.items():
            slopes[number].append(own.slopes(gradients[own.name]))
    kept, predicted = [own.kept for own in plan.blocks], 0.0
    for number, own in channels.items():
        leave, enter, gain = own.exchange(torch.stack(slopes[number]))
        kept[number] = tuple(sorted({*kept[number]} - {*leave} | {*enter}))
        predicted += gain
    return PruningPlan.of(structure, kept), predicted


def _channels(objective: Objective, plan: PruningPlan) -> dict[int, _Channels]:
    """Those of the feed-forwards of which some channels are removed, by number of the block."""
    compensation, layers = objective.compensation, kept_layers(objective.structure, plan)
    return {
        number: _Channels(
            block,
            objective.model.get_parameter(block.row_wise.parameter).detach(),
            partial(compensation.moments.__getitem__, number),
            own.kept,
            layers,
        )
        for number, (block, own) in enumerate(zip(objective.structure.blocks, plan.blocks, strict=True))
        if compensation
        and block.kind == "channels"
        and 0 < len(own.kept) < block.groups
        # Channels of experts are read by other projections, and behind a norm those that are kept are not as before.
        and not block.experts
        and not block.has_norm
    }


class _Channels:
    """The channels of one feed-forward.

    Attributes:
        name: of the weights that read the channels, in the model whose layers are those that are kept.

    Args:
        weight: of the dense model, as it is stored.
        moments: gives those of the block; those of all blocks may be too many to be held.
        kept: the numbers of the channels that are kept.
        layers: those of the dense model that are kept.
    """

    def __init__(
        self,
        block: Block,
        weight: Tensor,
        moments: Callable[[], InputMoments],
        kept: Sequence[int],
        layers: Sequence[int],
    ) -> None:
        self._part, self._weight, self._moments, self._groups = block.row_wise, weight, moments, block.groups
        self.name = self._part.parameter.replace(f".{block.layer}.", f".{layers.index(block.layer)}.", 1)
        self._kept = torch.tensor(kept, device=weight.device)

    def compensated(self) -> Tensor:
        """The least-squares weights (see `surgery.compensate`), as they are stored, zeros for removed channels."""
        fit = self._fit()
        whole = torch.zeros_like(fit.weight).index_copy_(1, fit.kept, fit.columns)
        return self._part.as_stored(whole[None].to(self._weight.dtype))

    def slopes(self, gradient: Tensor) -> Tensor:
        """[channels], float32: by how much the loss is higher, to first order, if a channel is kept than if it is not.

        Args:
            gradient: of the loss, to what `compensated` gives.
        """
        return self._fit().slopes(self._part.as_projection(gradient))

    def exchange(self, slopes: Tensor) -> tuple[list[int], list[int], float]:
        """Which channels leave, which enter in their place, and by how much the loss should fall.

        Args:
            slopes: [parts of the text, channels].
        """
        fit = self._fit()
        of_removed, of_kept, sizes_of_removed, sizes_of_kept = (
            part[..., channels] for part in (slopes, fit.sizes) for channels in (fit.removed, fit.kept)
        )
        size = sizes_of_removed.sum().clamp_min(torch.finfo(torch.float32).tiny)
        curvature = max(0.0, -float(of_removed.mean(0).sum() / size))
        # The curvature says what the slopes are where the layer is as its least squares see it.
        gains = curvature * sizes_of_removed / 2 - _signal(of_removed + curvature * sizes_of_removed, sizes_of_removed)
        costs = curvature * sizes_of_kept / 2 - _signal(of_kept, sizes_of_kept)
        most = min(math.ceil(_SHARE * self._groups), len(gains), len(costs))
        enter, leave = _apart(gains, fit.unsaid, most), _apart(-costs, fit.inverse, most)
        enter, leave = enter[: len(leave)], leave[: len(enter)]
        advantages = gains[enter] - costs[leave]
        pays = advantages > 0
        return fit.kept[leave[pays]].tolist(), fit.removed[enter[pays]].tolist(), float(advantages[pays].sum())

    def _fit(self) -> _Fit:
        weight, moments = self._part.as_projection(self._weight).float(), self._moments()
        is_removed = torch.ones(self._groups, dtype=torch.bool, device=weight.device).index_fill_(0, self._kept, False)
        second = moments.second.to(weight.device)
        return _Fit(weight, second, moments.damping, self._kept, is_removed.nonzero().flatten())


def _apart(worth: Tensor, coupled: Tensor, most: int) -> Tensor:
    """[at most so many], int64: the channels of the largest worth, without those that share much with a better one:
    what each is worth was measured alone.

    Args:
        worth: [channels].
        coupled: [channels, channels], second moments, or an inverse of them, of what all the others do not say.
    """
    chosen: list[int] = []
    diagonal = coupled.diagonal()
    for channel in worth.argsort(descending=True, stable=True)[: 4 * most].tolist():
        shared = coupled[channel, chosen].square() / (diagonal[channel] * diagonal[chosen])
        if len(chosen) < most and not (shared > _MOST_SHARED).any():
            chosen.append(channel)
    return torch.tensor(chosen, dtype=torch.int64, device=worth.device)


def _signal(slopes: Tensor, sizes: Tensor) -> Tensor:
    """[channels]: what slopes say that were measured on several parts of the text, drawn to zero by the share of their
    variance that is noise. Signal and noise both grow with the root of the size of a channel.

    Args:
        slopes: [parts of the text, channels].
    """
    # A channel that is always zero has no size.
    scaled = slopes / sizes.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    noise = scaled.var(0) / len(scaled)
    variance = (scaled.mean(0).square().mean() - noise.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return slopes.mean(0) * variance / (variance + noise)


@dataclass(frozen=True)
class _Fit:
    """Least squares for the kept inputs of a projection, and what one input more or less changes.

    Attributes:
        weight: [outputs, inputs], float32, before anything is removed.
        second: [inputs, inputs], float32, H.
        kept, removed: numbers of the inputs, ascending.
    """

    weight: Tensor
    second: Tensor
    damping: float
    kept: Tensor
    removed: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """[kept, kept]: (H_KK + damping · I)⁻¹."""
        return inverse_damped(self.second[self.kept][:, self.kept], self.damping)

    @cached_property
    def said(self) -> Tensor:
        """[kept, removed], what the kept inputs say of the removed ones: (H_KK + damping · I)⁻¹ H_KR."""
        return self.inverse @ self.second[self.kept][:, self.removed]

    @cached_property
    def unsaid(self) -> Tensor:
        """[removed, removed], second moments of what they do not say."""
        across = self.second[self.removed][:, self.kept]
        unsaid = self.second[self.removed][:, self.removed] - across @ self.said
        unsaid.diagonal().add_(self.damping).clamp_min_(self.damping)
        return unsaid

    @cached_property
    def columns(self) -> Tensor:
        """[outputs, kept]: the compensated weights."""
        return self.weight[:, self.kept] + self.weight[:, self.removed] @ self.said.T

    @cached_property
    def columns_if_kept(self) -> Tensor:
        """[outputs, removed]: for each removed input, what its weight would be if it were kept beside the others: it
        would make up for the removed inputs of which it says something, too."""
        return self.weight[:, self.removed] @ self.unsaid / self.unsaid.diagonal()

    @cached_property
    def sizes(self) -> Tensor:
        """[inputs]: the square of what changes in the output if an input is kept or not, with the other weights
        compensated in both cases, per token; tr(D (H + damping · I) Dᵀ)."""
        return self._of_all(
            self.columns.square().sum(0) / self.inverse.diagonal(),
            self.columns_if_kept.square().sum(0) * self.unsaid.diagonal(),
        )

    def slopes(self, gradient: Tensor) -> Tensor:
        """[inputs]: by how much the loss is higher, to first order, if an input is kept than if it is not.

        Args:
            gradient: [outputs, inputs], float32, to the compensated weights.
        """
        of_kept, of_removed = gradient[:, self.kept], gradient[:, self.removed]
        return self._of_all(
            (self.columns * (of_kept @ self.inverse)).sum(0) / self.inverse.diagonal(),
            (self.columns_if_kept * (of_removed - of_kept @ self.said)).sum(0),
        )

    def _of_all(self, of_kept: Tensor, of_removed: Tensor) -> Tensor:
        both = torch.empty(len(self.second), device=self.weight.device)
        both[self.kept], both[self.removed] = of_kept, of_removed
        return both


def _gradients(
    model: PreTrainedModel,
    wide: PreTrainedModel,
    weights: Mapping[str, Tensor],
    windows: Tensor,
    progress: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    """Of the divergence from the dense model, in nats per predicted token, of another one in which some weights are
    replaced: the gradients to these weights, float32."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    for batch in windows.to(model.device).split(LEARNT_AT_ONCE):
        with torch.no_grad():
            expected = model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with torch.enable_grad():
            logits = functional_call(wide, leaves, (batch,), {"use_cache": False}).logits[:, :-1]
            predicted = logits.float().log_softmax(-1)
            # A sum, because gradients of a mean would underflow in float16.
            divergence = functional.kl_div(predicted, expected, reduction="sum", log_target=True)
            divergence.backward()
        if progress:
            progress(1)
    tokens = len(windows) * (windows.shape[1] - 1)
    return {name: weight.grad.float() / tokens for name, weight in leaves.items() if weight.grad is not None}

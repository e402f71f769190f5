"""Other pruning methods, written anew from their formulas: OSSCAR, SlimGPT, MoDeGPT and LLM-Pruner.

Where a paper says how much each layer loses, its rule is used; otherwise all layers but the first four and the last
three lose the same share of their channels, which was best for every one of them on SmolLM2. Those that compensate
share our least squares, whose damping was chosen on held-out windows. The papers of SlimGPT and OSSCAR measure each
layer after the pruned ones; here all are measured in the dense model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.budget.plan import make_plan
from adapruner.evaluation.losses import window_losses
from adapruner.importance import LLM_PRUNER_METRICS, score_groups
from adapruner.measurement.moments import StoredMoments, factorize, measure_moments, removal_errors
from adapruner.measurement.taylor import measure
from adapruner.model.layers import decoder_layers
from adapruner.model.loading import in_fastest_dtype
from adapruner.structure.blocks import Block, Structure
from adapruner.surgery import prune_model

PROTECTED_FIRST, PROTECTED_LAST = 4, 3
# OSSCAR's code: channels swapped at a time, and rounds of swaps.
SWAPPED, SWAP_ROUNDS = 10, 30
# The ε of MoDeGPT. The paper's values were not found. The smaller it is, the less even are the shares.
SMOOTHNESS = 0.1
# LLM-Pruner draws ten samples; its best metric is chosen on these windows.
SAMPLES, JUDGED = 10, 14


@dataclass
class Setting:
    """A model, and the text that a method may use.

    Attributes:
        windows: [windows, tokens], int64.
        parameters: to remove.
        folder: what does not depend on the ratio, for every method.
        protects: the first four and the last three layers lose nothing; otherwise all layers have the same widths.
        saved_seconds: of a processor, that others spent on what this method took from there.
    """

    dense: PreTrainedModel
    structure: Structure
    windows: Tensor
    parameters: float
    folder: Path
    protects: bool = True
    saved_seconds: float = 0.0

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that is made once, with what that took beside it."""
        made, price = self.folder / name, self.folder / f"{name}.json"
        if price.exists():
            self.saved_seconds += json.loads(price.read_text())
        else:
            begun = time.process_time()
            made.mkdir(parents=True, exist_ok=True)
            make(made)
            price.write_text(json.dumps(time.process_time() - begun))
        return made

    def moments(self, counts: Sequence[int]) -> StoredMoments:
        """Second moments of the inputs of every projection from which these counts remove something."""
        blocks = [number for number, block in enumerate(self.structure.blocks) if counts[number] < block.groups]

        def make(folder: Path) -> None:
            for block, moments in measure_moments(in_fastest_dtype(self.dense), self.structure, self.windows, blocks):
                moments.save(StoredMoments(folder).path(block))

        return StoredMoments(self.once(f"moments of {'-'.join(map(str, blocks))}", make))

    def elimination_errors(self, moments: StoredMoments) -> Tensor:
        """[groups]: the error of each when the cheapest of its block is removed again and again."""

        def make(folder: Path) -> None:
            save_file(
                removal_errors(self.dense, self.structure, moments, variance=False), folder / "errors.safetensors"
            )

        made = self.once(f"elimination of {'-'.join(map(str, moments))}", make)
        return load_file(made / "errors.safetensors")["elimination_error"]

    def counts(self, shares: Sequence[float]) -> list[int]:
        """Number of groups that each block keeps, if channels are removed in proportion to a share of each layer."""

        def at(scale: float) -> list[int]:
            return [
                round(block.groups * (1 - min(0.9, scale * shares[block.layer])))
                if block.kind == "channels"
                else block.groups
                for block in self.structure.blocks
            ]

        low, high = 0.0, 1 / max(min(share for share in shares if share), 1e-9)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.structure.removed_parameters(at(middle)) < self.parameters else (low, middle)
            )
        return at(high)

    @property
    def even(self) -> list[int]:
        """The counts if all unprotected layers lose the same share."""
        layers = self.structure.layers
        loses = range(PROTECTED_FIRST, layers - PROTECTED_LAST) if self.protects else range(layers)
        return self.counts([float(layer in loses) for layer in range(layers)])

    def by_block(self, flat: Tensor) -> list[tuple[int, Block, Tensor]]:
        """The number of every block, the block, and its part of a tensor over all groups."""
        parts = flat.split([block.groups for block in self.structure.blocks])
        return list(zip(range(len(parts)), self.structure.blocks, parts, strict=True))

    def cut(self, scores: Tensor, counts: Sequence[int], moments: StoredMoments | None = None) -> PreTrainedModel:
        """The model with so many groups of each block, those of highest score ([groups])."""
        return prune_model(self.dense, self.structure, make_plan(self.structure, scores, counts), moments)


def slimgpt(setting: Setting) -> PreTrainedModel:
    """SlimGPT (arXiv 2412.18110): optimal brain surgeon in batches, layer i of n losing r_0 + (r_last - r_0) · log(i +
    1) / log(n) of its channels. The paper does not state r_0: it is 0 here, and r_last follows from the ratio."""
    layers = setting.structure.layers
    counts = setting.counts([math.log(layer + 1) / math.log(layers) for layer in range(layers)])
    moments = setting.moments(counts)
    scores = setting.elimination_errors(moments)
    return setting.cut(scores, counts, moments)


def osscar(setting: Setting) -> PreTrainedModel:
    """OSSCAR (arXiv 2403.12983): the elimination of SlimGPT, then swaps between kept and removed channels as long as
    they lower the error of the layer."""
    counts = setting.even
    moments = setting.moments(counts)
    scores = setting.elimination_errors(moments)
    for index, block, own in setting.by_block(scores):
        if block.kind == "channels" and counts[index] < block.groups:
            weight, of_block = setting.dense.get_parameter(block.row_wise.parameter), moments[index]
            inverse = torch.cholesky_inverse(factorize(of_block.second, of_block.damping))
            cheapest = own.argsort(stable=True)[: block.groups - counts[index]]
            removed = swap(block.row_wise.as_projections(weight.detach())[0].double(), inverse.double(), cheapest)
            own.fill_(1.0)[removed] = 0.0
    return setting.cut(scores, counts, moments)


def swap(weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
    """[removed], int64: other channels to remove. The cheapest of the kept are removed, and as many return whose
    return gains most; fewer at a time once that does not lower the error.

    Args:
        weight: [outputs, inputs], float64.
        inverse: [inputs, inputs], float64, of the damped second moments.
    """
    size, rounds = min(SWAPPED, (weight.shape[1] - len(removed)) // 2), 0
    error, costs, _ = reconstruction(weight, inverse, removed)
    while size and rounds < SWAP_ROUNDS:
        rounds += 1
        more = torch.cat([removed, costs.argsort(stable=True)[:size]])
        gains = reconstruction(weight, inverse, more)[2]
        fewer = more[gains[more].argsort(stable=True)[: len(removed)]]
        changed, costs_then, _ = reconstruction(weight, inverse, fewer)
        if changed < error * (1 - 1e-9):
            removed, error, costs = fewer, changed, costs_then
        else:
            size //= 2
    return removed


def reconstruction(weight: Tensor, inverse: Tensor, removed: Tensor) -> tuple[float, Tensor, Tensor]:
    """The error of a layer without some channels, its other weights refitted: tr(W_R M W_Rᵀ) with M = ([H⁻¹]_RR)⁻¹.

    Returns:
        The error in units of the squared output per token. [inputs], by how much it rises when a channel is removed
        too, infinite for the removed. [inputs], by how much it falls when a channel returns, 0 for the kept.
    """
    middle = torch.cholesky_inverse(torch.linalg.cholesky(inverse[removed][:, removed]))
    moved, across = weight[:, removed] @ middle, inverse[removed]
    # The refitted weights, and the diagonal of the inverse of the moments of the kept channels.
    refitted, diagonal = weight - moved @ across, inverse.diagonal() - (across * (middle @ across)).sum(0)
    costs, gains = refitted.square().sum(0) / diagonal, torch.zeros_like(diagonal)
    costs[removed], gains[removed] = torch.inf, moved.square().sum(0) / middle.diagonal()
    return float((moved * weight[:, removed]).sum()), costs, gains


def modegpt(setting: Setting) -> PreTrainedModel:
    """MoDeGPT (arXiv 2408.09632), feed-forwards only: the channels of highest ridge leverage [C (C + I)⁻¹]_cc are kept,
    with C the sum of x xᵀ over the tokens; least squares is its Nyström formula. Layer i loses in proportion to
    exp(-influence_i / ε)."""
    counts = setting.counts((-block_influence(setting).double() / SMOOTHNESS).softmax(0).tolist())
    moments = setting.moments(counts)
    scores = torch.zeros(setting.structure.group_offsets[-1], dtype=torch.float64)
    for index, _, own in setting.by_block(scores):
        if index in moments:
            ridge = 1 / setting.windows.numel()
            own.copy_(1 - ridge * torch.cholesky_inverse(factorize(moments[index].second, ridge)).diagonal())
    return setting.cut(scores, counts, moments)


@torch.inference_mode()
def block_influence(setting: Setting) -> Tensor:
    """[layers]: 1 - cos(input, output) of a layer, mean over the tokens (arXiv 2403.03853)."""
    fast, influence = in_fastest_dtype(setting.dense), torch.zeros(setting.structure.layers)

    def add(_: Any, inputs: tuple[Tensor, ...], output: Any, own: Tensor) -> None:
        after = output[0] if isinstance(output, tuple) else output
        own.add_((1 - functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)).sum())

    hooks = [
        layer.register_forward_hook(partial(add, own=own))
        for layer, own in zip(decoder_layers(fast), influence, strict=True)
    ]
    for batch in setting.windows.split(4):
        fast.base_model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return influence / setting.windows.numel()


def llm_pruner(setting: Setting) -> PreTrainedModel:
    """LLM-Pruner (arXiv 2305.11627): its four metrics, on ten samples; the best on windows of the same text. Nothing is
    compensated."""
    structure, counts, judged = setting.structure, setting.even, setting.windows[-JUDGED:]
    separate = measure(setting.dense, structure, setting.windows[:SAMPLES], batch_size=2)
    # First order from the mean gradient, as LLM-Pruner takes it.
    jointly = measure(setting.dense, structure, setting.windows[:SAMPLES], batch_size=SAMPLES, jointly=True)

    def made(name: str) -> PreTrainedModel:
        statistics = separate if name == "param_second" else jointly
        return setting.cut(score_groups(statistics, structure, LLM_PRUNER_METRICS[name]), counts)

    losses = {name: float(window_losses(in_fastest_dtype(made(name)), judged).mean()) for name in LLM_PRUNER_METRICS}
    return made(min(losses, key=losses.__getitem__))


PEERS: dict[str, Callable[[Setting], PreTrainedModel]] = {
    "OSSCAR": osscar,
    "SlimGPT": slimgpt,
    "MoDeGPT": modegpt,
    "LLM-Pruner": llm_pruner,
}
# SlimGPT and MoDeGPT are rules of how layers differ: of them, nothing is left where all have the same widths.
WITHOUT_PROTECTION = ("OSSCAR", "LLM-Pruner")

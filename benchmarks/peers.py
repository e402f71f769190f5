"""Newer pruning methods, written anew from their formulas: SlimGPT, OSSCAR, MoDeGPT, 2SSP, BlockPruner and GRASPrune.

Makes "Newer methods" and "A second model" of research/results.md. Takes about a day for all methods and ratios.

    python benchmarks/peers.py --output runs/peers

All of them are calibrated on the windows of BoolQ passages that our runs take second moments from. Perplexities are
written to results.jsonl, one line per pruned model; rerun to resume. A table ends the run.

Where a paper says how much each layer loses, its rule is used. Otherwise all layers that `peer_budget` of comparison.py
leaves unprotected lose the same share (4 to 26 of SmolLM2, channels only; at 50 % more layers, and KV groups too),
because that is best for every peer. The methods that compensate share the moments of the dense model, and their damping
was chosen on held-out windows. The papers of SlimGPT and OSSCAR prune layer by layer instead, each measured behind the
pruned ones; of our own fit this changes little at 20 %, and at 50 % it is worse on text of other kinds.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as functional
from cyclopts import Parameter, run
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from adapruner.calibration._pool import evenly_spaced, text_windows
from adapruner.calibration._sources import parse_source
from adapruner.evaluation._losses import compute_prefix, losses_by_batch
from adapruner.evaluation._perplexity import measure_perplexity
from adapruner.measurement._moments import StoredMoments, factorize, measure_moments, projected_blocks
from adapruner.measurement._removal import removal_errors
from adapruner.models._device import in_fastest_dtype
from adapruner.models._layers import other_forwards
from adapruner.models._loading import load_model, load_tokenizer
from adapruner.models._places import find_model
from adapruner.models.modeling_pruned import Nothing
from adapruner.planning._budget import kept_counts, weigh_channels
from adapruner.planning._plan import make_plan
from adapruner.structure._blocks import Block, Structure, count_parameters
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import prune_model
from comparison import peer_budget

Peer = Literal["SlimGPT", "OSSCAR", "MoDeGPT", "2SSP", "BlockPruner", "GRASPrune"]
# The attention or feed-forward of a layer.
Part = tuple[str, int]
# Of each part, its module in a layer, and the number of values that it returns.
PARTS = {"attention": ("self_attn", 2), "feed-forward": ("mlp", 0)}
TEXTS = ("boolq-passages@report", "wikitext2:validation", "ptb")

# OSSCAR's code: channels swapped at a time, and rounds of swaps.
SWAPPED, SWAP_ROUNDS = 10, 30
# The ε of MoDeGPT. The paper's values were not found. The smaller it is, the less even are the shares.
SMOOTHNESS = 0.1
# The α of 2SSP, which its authors use for every model and ratio.
BALANCE = 1.5
# GRASPrune's code: temperature of the gates, how far a scale may be from 1, learning rate, tokens per step.
TEMPERATURE, REACH, LEARNING_RATE, TOKENS_PER_STEP = 1.5, 0.5, 1e-2, 512


@dataclass
class Setting:
    """What all peers share; see `main`.

    Attributes:
        windows: [windows, tokens], int64, of the calibration text; so are `judging`, those that judge whole parts, and
            `reports`, by text.
    """

    output: Path
    dense: PreTrainedModel
    structure: Structure
    windows: Tensor
    reports: dict[str, Tensor]
    judging: Tensor
    gate_steps: int

    @cached_property
    def fast(self) -> PreTrainedModel:
        """The dense model for forward passes and gates."""
        return in_fastest_dtype(self.dense).requires_grad_(False)

    @cached_property
    def moments(self) -> StoredMoments:
        """Second moments of the inputs of every row-wise projection, kept in the output folder."""
        stored = StoredMoments(self.output / f"moments-{len(self.windows)}")
        stored.folder.mkdir(exist_ok=True)
        missing = [block for block in projected_blocks(self.structure) if not stored.path(block).is_file()]
        for block, moments in measure_moments(self.dense, self.structure, self.windows, missing):
            moments.save(stored.path(block))
        return stored

    @cached_property
    def eliminated(self) -> Tensor:
        """[groups]: what each group adds to the error when all are eliminated, the cheapest first, with the weights
        updated in between (optimal brain surgeon); ascending in the order of elimination."""
        return removal_errors(self.dense, self.structure, self.moments)["elimination_error"]

    @cached_property
    def activity(self) -> tuple[Tensor, Tensor]:
        """[groups], the L2 norm of each channel over the tokens of a window, mean over the windows; and [layers], the
        block influence 1 - cos(input, output) of a layer, mean over the tokens (arXiv 2403.03853)."""
        norms, influence = torch.zeros(self.structure.group_offsets[-1]), torch.zeros(self.structure.layers)

        def add_norms(_: Any, inputs: tuple[Tensor, ...], own: Tensor) -> None:
            own.add_(inputs[0].float().norm(dim=1).sum(0))

        def add_influence(_: Any, inputs: tuple[Tensor, ...], output: Tensor, own: Tensor) -> None:
            own.add_((1 - functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)).sum())

        inner: Any = self.fast.base_model
        with ExitStack() as hooks, torch.inference_mode():
            for block, own in by_block(self.structure, norms):
                if block.kind == "channels":
                    module = self.fast.get_submodule(block.row_wise.module)
                    hooks.enter_context(module.register_forward_pre_hook(partial(add_norms, own=own)))
            for number, module in enumerate(inner.layers):
                hooks.enter_context(module.register_forward_hook(partial(add_influence, own=influence[number])))
            for batch in self.windows.split(4):
                inner(batch, use_cache=False)
        return norms / len(self.windows), influence / self.windows.numel()

    def refitted(self, scores: Tensor, counts: Sequence[int]) -> PreTrainedModel:
        """The model with so many groups of each block, those of highest score ([groups]), and least squares."""
        plan = make_plan(self.structure, scores, counts)
        return prune_model(self.dense, self.structure, plan, self.moments)

    def without(self, gone: Collection[Part], scores: Tensor, counts: Sequence[int]) -> PreTrainedModel:
        """The model without some whole parts, and of the other blocks the groups of highest score ([groups])."""
        blocks = zip(self.structure.blocks, counts, strict=True)
        left = [0 if block.kind == "heads" and (block.part, block.layer) in gone else count for block, count in blocks]
        pruned = prune_model(self.dense, self.structure, make_plan(self.structure, scores, left))
        for part, layer in gone:
            if part == "feed-forward":
                pruned.model.layers[layer].mlp = Nothing(0)
        return pruned

    def report(self, ratio: float, method: str, make: Callable[[], PreTrainedModel]) -> None:
        """Evaluates the model of a method, unless that was done."""
        if any((entry["ratio"], entry["method"]) == (ratio, method) for entry in read(self.output / "results.jsonl")):
            return
        start = time.perf_counter()
        model = in_fastest_dtype(make())
        seconds = time.perf_counter() - start
        removed = 1 - count_parameters(model) / count_parameters(self.dense)
        perplexity = {text: measure_perplexity(model, part, text).perplexity for text, part in self.reports.items()}
        entry = {"ratio": ratio, "method": method, "removed": removed, "perplexity": perplexity, "seconds": seconds}
        append(self.output / "results.jsonl", entry)
        print(entry, flush=True)


def read(path: Path) -> list[Any]:
    """The lines of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, entry: Any) -> None:
    """Adds a line to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def by_block(structure: Structure, flat: Tensor) -> list[tuple[Block, Tensor]]:
    """Every block with its part of a tensor over all groups."""
    sizes = [block.groups for block in structure.blocks]
    return list(zip(structure.blocks, flat.split(sizes), strict=True))


def slimgpt(setting: Setting, ratio: float) -> PreTrainedModel:
    """SlimGPT (arXiv 2412.18110): optimal brain surgeon in batches, layer i of n losing r_0 + (r_last - r_0) · log(i +
    1) / log(n) of its channels.

    The paper does not state r_0. It is 0 here, and r_last follows from the ratio. 1/64 of the channels are removed at a
    time; the paper begins with more and ends with fewer.
    """
    layers = setting.structure.layers
    shares = tuple(math.log(layer + 1) / math.log(layers) for layer in range(layers))
    counts = kept_counts(setting.structure, weigh_channels(setting.structure, peer_budget(ratio), shares))
    return setting.refitted(setting.eliminated, counts)


def osscar(setting: Setting, ratio: float) -> PreTrainedModel:
    """OSSCAR (arXiv 2403.12983): the elimination of SlimGPT, then swaps between kept and removed channels as long as
    they lower the error of the layer. Every layer loses the same share. Of the few KV groups in a layer none is
    swapped."""
    counts = kept_counts(setting.structure, peer_budget(ratio))
    scores = setting.eliminated.clone()
    for index, (block, own) in enumerate(by_block(setting.structure, scores)):
        if block.kind == "channels" and counts[index] < block.groups:
            weight, moments = setting.dense.get_parameter(block.row_wise.parameter), setting.moments[index]
            inverse = torch.cholesky_inverse(factorize(moments.second, moments.damping))
            cheapest = own.argsort(stable=True)[: block.groups - counts[index]]
            removed = swap(weight.detach().double(), inverse, cheapest)
            own.fill_(1.0)[removed] = 0.0
    return setting.refitted(scores, counts)


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


def modegpt(setting: Setting, ratio: float) -> PreTrainedModel:
    """MoDeGPT (arXiv 2408.09632), feed-forwards only: the channels of highest ridge leverage [C (C + I)⁻¹]_cc are kept,
    with C the sum of x xᵀ over the tokens. By the Nyström formula the down projection becomes W C_:K C_KK⁻¹, which is
    least squares; it is damped here. Layer i loses in proportion to exp(-influence_i / ε).

    Attention is cut at 50 % only, evenly and by removal errors as for SlimGPT and OSSCAR. Cut as published it costs
    more on this model.
    """
    influence = setting.activity[1]
    shares = tuple((-influence.double() / SMOOTHNESS).softmax(0).tolist())
    counts = kept_counts(setting.structure, weigh_channels(setting.structure, peer_budget(ratio), shares))
    scores = setting.eliminated.double()
    for index, (block, own) in enumerate(by_block(setting.structure, scores)):
        if block.kind == "channels":
            own.copy_(ridge_leverage(setting.moments[index].second, 1 / setting.windows.numel()))
    return setting.refitted(scores, counts)


def ridge_leverage(second: Tensor, ridge: float) -> Tensor:
    """[inputs], float64: the diagonal of H (H + ridge · I)⁻¹, with H = E[x xᵀ] the second moments."""
    return 1 - ridge * torch.cholesky_inverse(factorize(second, ridge)).diagonal()


def two_stages(setting: Setting, ratio: float) -> PreTrainedModel:
    """2SSP (arXiv 2501.17771): of n layers, round(n · s^(f / (1.5 · a))) lose their attention, with s the ratio of the
    decoder layers and f and a the parameters of a feed-forward and an attention. First every layer keeps the same
    number of channels, those of the largest norm; then attentions are removed greedily. Nothing is compensated."""
    structure, (norms, _) = setting.structure, setting.activity
    sizes = sizes_of_parts(structure)
    attention, feed_forward = (sum(size for (name, _), size in sizes.items() if name == part) for part in PARTS)
    target, layers = ratio * structure.total_parameters, structure.layers
    attentions = round(
        layers * (target / count_parameters(setting.dense.model.layers)) ** (feed_forward / attention / BALANCE)
    )
    share = (target - attentions * attention / layers) / feed_forward
    counts = [each.groups if each.kind == "heads" else round(each.groups * (1 - share)) for each in structure.blocks]
    narrow = in_fastest_dtype(setting.without((), norms, counts))
    order = greedily(setting, narrow, [("attention", layer) for layer in range(layers)], [])
    return setting.without({next(order) for _ in range(attentions)}, norms, counts)


def block_pruner(setting: Setting, ratio: float) -> PreTrainedModel:
    """BlockPruner (arXiv 2406.10594): whole attentions and feed-forwards are removed one at a time, always the one
    without which perplexity is lowest. The order is the same for all ratios and is kept in the output folder.

    A part that would exceed the ratio by more than half an attention is passed over.
    """
    structure = setting.structure
    parts = sizes_of_parts(structure)
    target, slack = ratio * structure.total_parameters, min(parts.values()) / 2
    path = setting.output / f"order-{len(setting.judging)}.jsonl"
    known: list[Part] = list(map(tuple, read(path)))
    gone, removed = set[Part](), 0
    for part in chain(known, greedily(setting, setting.fast, parts, known)):
        if part not in known:
            append(path, part)
        if removed + parts[part] <= target + slack:
            gone.add(part)
            removed += parts[part]
        if removed >= target - slack:
            break
    everything = [block.groups for block in structure.blocks]
    return setting.without(gone, torch.zeros(sum(everything)), everything)


def greedily(setting: Setting, model: PreTrainedModel, parts: Iterable[Part], gone: list[Part]) -> Iterator[Part]:
    """Removes one part after another beside those that are gone, each time the one that leaves the lowest loss. 2SSP
    judges by one window of 2,048 tokens and BlockPruner by 256 samples of Alpaca, here both by the same windows."""
    removed, left = list(gone), [part for part in parts if part not in gone]
    while left:
        losses: dict[Part, float] = {}
        with ExitStack() as removals:
            for part in removed:
                removals.enter_context(without_part(model, part))
            prefix = compute_prefix(model, setting.judging, setting.structure.layers)
            for part in left:
                with without_part(model, part):
                    batches = losses_by_batch(model, setting.judging, prefix=prefix, prefix_layers=part[1])
                    losses[part] = float(torch.cat(list(batches)).mean())
        best = min(left, key=losses.__getitem__)
        left.remove(best)
        removed.append(best)
        yield best


def sizes_of_parts(structure: Structure) -> dict[Part, int]:
    """The parameters of the attention and of the feed-forward of every layer."""
    return {
        (block.part, block.layer): block.groups * block.parameters_per_group + block.rest
        for part in PARTS
        for block in structure.blocks
        if block.part == part
    }


def without_part(model: PreTrainedModel, part: Part) -> AbstractContextManager[None]:
    """While it lasts, a part adds nothing to the hidden state."""
    name, returned = PARTS[part[0]]
    return other_forwards({model.model.layers[part[1]].get_submodule(name): Nothing(returned).forward})


def grasprune(setting: Setting, ratio: float) -> PreTrainedModel:
    """GRASPrune (arXiv 2604.19398): one logit per channel and KV group, learnt with the weights frozen. In every step
    the groups of highest probability that fit into the budget form a hard mask, and the gradient of the loss passes
    straight through it to the probabilities. Then a scale between 0.5 and 1.5 of every kept group is learnt and folded
    into the weights. Nothing is protected.

    All logits begin alike in the paper's code; here they begin with noise, which decides the first mask. The budget is
    a share of all parameters, and the best group of every block counts towards it. By default gates are learnt for four
    epochs and scales for one, as in the paper's code, but an epoch has 98 thousand tokens in place of 262 thousand.
    """
    structure = setting.structure
    prunable = sum(block.groups * block.parameters_per_group for block in structure.blocks)
    budget = prunable - ratio * structure.total_parameters
    noise = torch.randn(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    logits, scales = (1e-3 * noise).requires_grad_(), torch.zeros_like(noise).requires_grad_()

    def straight_through() -> Tensor:
        chances = (logits / TEMPERATURE).sigmoid()
        return budget_mask(structure, chances.detach(), budget) + chances - chances.detach()

    learn(setting, logits, straight_through, setting.gate_steps)
    mask = budget_mask(structure, logits.detach(), budget)
    learn(setting, scales, lambda: mask * (1 + REACH * scales.tanh()), setting.gate_steps // 4)
    folded = copy.deepcopy(setting.dense)
    with torch.no_grad():
        for name, weight in gated(folded, structure, 1 + REACH * scales.tanh()).items():
            folded.get_parameter(name).copy_(weight)
    counts = [int(own.sum()) for _, own in by_block(structure, mask)]
    return prune_model(folded, structure, make_plan(structure, mask, counts))


def budget_mask(structure: Structure, scores: Tensor, parameters: float) -> Tensor:
    """[groups], 1.0 for the kept: from the highest score ([groups]) on, up to the first group with which they would
    have more parameters than given. The best group of each block comes before all others."""
    costs = torch.cat([torch.full((block.groups,), block.parameters_per_group) for block in structure.blocks])
    ranked = scores.clone()
    for _, own in by_block(structure, ranked):
        own[own.argmax()] = torch.inf
    order = ranked.argsort(descending=True, stable=True)
    mask = torch.zeros_like(scores)
    mask[order[costs[order].cumsum(0) <= parameters]] = 1.0
    return mask


def gated(model: PreTrainedModel, structure: Structure, factors: Tensor) -> dict[str, Tensor]:
    """The weights that multiply groups by factors ([groups]), by name: the columns of the down projections for the
    channels, the rows of the key and value projections for the KV groups."""
    weights = {}
    for block, own in by_block(structure, factors):
        for part in block.matrices:
            if part is block.row_wise if block.kind == "channels" else part.module.endswith(("k_proj", "v_proj")):
                weight, along = model.get_parameter(part.parameter), own.repeat_interleave(part.width)
                weights[part.parameter] = weight * (along if part.axis else along[:, None]).to(weight.dtype)
    return weights


def learn(setting: Setting, parameter: Tensor, factors: Callable[[], Tensor], steps: int) -> None:
    """Takes steps down the loss of the calibration windows, in random order. From the parameter follow the factors
    that the groups are multiplied by, [groups]."""
    optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    generator, windows = torch.Generator().manual_seed(0), setting.windows
    batch_size = max(1, TOKENS_PER_STEP // windows.shape[1])
    epochs = -(-steps * batch_size // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    for batch in order[: steps * batch_size].split(batch_size):
        tokens = windows[batch]
        weights = gated(setting.fast, setting.structure, factors())
        logits = functional_call(setting.fast, weights, (tokens,), {"use_cache": False}).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


PEERS: dict[Peer, Callable[[Setting, float], PreTrainedModel]] = {
    "SlimGPT": slimgpt,
    "OSSCAR": osscar,
    "MoDeGPT": modegpt,
    "2SSP": two_stages,
    "BlockPruner": block_pruner,
    "GRASPrune": grasprune,
}


def main(
    *,
    output: Path,
    peers: Annotated[tuple[Peer, ...], Parameter(consume_multiple=True)] = tuple(PEERS),
    ratios: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.1, 0.2, 0.3, 0.5),
    model: str = "smollm2",
    windows: int = 192,
    calibration_windows: int = 768,
    greedy_windows: int = 32,
    gate_steps: int = 768,
) -> None:
    """Runs what results.jsonl does not hold yet.

    Args:
        model: of the Llama architecture.
        windows: of each reported text, evenly spaced, as are those of calibration.
        greedy_windows: calibration windows that judge the removal of whole attentions and feed-forwards.
        gate_steps: steps of 512 tokens in which GRASPrune learns gates; a quarter as many follow for the scales.
    """
    output.mkdir(parents=True, exist_ok=True)
    location = find_model(model)
    tokenizer, dense = load_tokenizer(location), load_model(location)

    def spaced(text: str, count: int) -> Tensor:
        return evenly_spaced(text_windows(parse_source(text, "report"), tokenizer, 128), count)

    calibration = spaced("boolq-passages@calibration", calibration_windows)
    reports, judging = {text: spaced(text, windows) for text in TEXTS}, evenly_spaced(calibration, greedy_windows)
    structure = build_structure(dense)
    # No peer weights tokens by what a norm makes of them.
    structure = replace(structure, blocks=tuple(replace(block, is_normalized=False) for block in structure.blocks))
    setting = Setting(output, dense, structure, calibration, reports, judging, gate_steps)
    setting.report(0.0, "dense", lambda: dense)
    for peer, ratio in product(peers, ratios):
        setting.report(ratio, peer, partial(PEERS[peer], setting, ratio))
    print_table(read(output / "results.jsonl"))


def print_table(results: list[dict[str, Any]]) -> None:
    """Markdown: the perplexity on each text and, in brackets, how many times that of the dense model."""
    dense = next(entry["perplexity"] for entry in results if entry["method"] == "dense")
    print(f"| removed | method | {' | '.join(dense)} |")
    print("|---" * (len(dense) + 2) + "|")
    for entry in sorted(results, key=lambda entry: entry["ratio"]):
        cells = [f"{value:.1f} ({value / dense[text]:.2f} ×)" for text, value in entry["perplexity"].items()]
        print(f"| {entry['removed']:.1%} | {entry['method']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)

"""Mixtures of experts made from a dense model, and which experts of them can be removed.

Makes "Mixtures" of research/results.md. The channels of every feed-forward are split into experts by co-activation. The
router is fitted to the sizes of their outputs, and the down projections to the hidden states of the dense model, layer
by layer. Then experts, routers and norms are trained to predict as the dense model does; attention and embeddings stay
those of the dense model. `--start` trains a mixture further, by default towards more even loads.

    python benchmarks/mixtures.py make --experts 8 --active 2 --seed 0 --output runs/mixtures/A
    python benchmarks/mixtures.py make --experts 16 --active 4 --seed 1 --output runs/mixtures/B
    python benchmarks/mixtures.py make --start runs/mixtures/A --seed 2 --output runs/mixtures/C
    python benchmarks/mixtures.py judge --output runs/mixtures/A
    python benchmarks/mixtures.py table runs/mixtures/A runs/mixtures/B runs/mixtures/C
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cyclopts import App
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from adapruner.base.files import find_local_data
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.evaluation.losses import measure_perplexity, window_losses
from adapruner.families import open_model, resolve
from adapruner.importance import MetricPoint, score_groups
from adapruner.measurement.moments import StoredMoments, measure_moments, removal_errors
from adapruner.measurement.routing import measure_routing
from adapruner.measurement.taylor import Statistics, measure
from adapruner.model.layers import decoder_layers, enter_layers
from adapruner.model.loading import copy_in_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.options import TrainedWeights
from adapruner.search.judging import Objective
from adapruner.search.space import ExtendedSpace, build_subset_family
from adapruner.search.study import Search, StudyFile
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.sources import parse_source
from adapruner.text.windows import Text, evenly_spaced, start_of_windows, text_windows
from adapruner.train.healing import heal, healing_options, length_of_windows

app = App(help=__doc__)
LENGTH = 128
# Reported: perplexity, and by kind the divergence from the mixture before pruning. Files of shared data by their place.
TEXTS = ("boolq-passages@report", "wikitext2:validation", "ptb")
# Read to make a mixture and to rank its experts: the share of each kind, and its datasets.
LEARNT = {
    "prose": (0.6, ("boolq-passages@calibration", "books/gutenberg_passages.jsonl@calibration")),
    "code": (0.2, ("python-code@calibration",)),
    "instructions": (0.2, ("instruction/alpaca_en_demo_llamafactory.jsonl@calibration",)),
}
KINDS = {
    "prose": "books/gutenberg_passages.jsonl@report",
    "code": "python-code@report",
    "instructions": "instruction/alpaca_stanford_subset.jsonl@report",
}
# Rankings by terms of the package, and those that need more; trials of the search.
RANKED_BY = {
    "counts": ("expert_frequency",),
    "REAP": ("expert_output",),
    "Taylor": ("fine_first",),
    "Taylor, second order": ("fine_second",),
    "REAP and Taylor": ("expert_output", "fine_first"),
}
OTHERS, TRIALS = ("search", "channels"), 8
# Windows that split and fit, and channels of a token that count as active.
FITTED, ACTIVE_CHANNELS = 128, 0.1
# Of training: the weight of the hidden states in the loss; the peak learning rate and the weight of even loads, from a
# dense model and from a mixture.
WINDOWS_PER_STEP, STATES, NEW, FURTHER = 8, 1.0, (1e-3, 0.01), (5e-4, 0.2)


def windows_of(name: str, tokenizer: Tokenizer) -> Tensor:
    """[windows, tokens]: a dataset in windows; the name may be a file of the shared data."""
    path, at, part = name.partition("@")
    file = find_local_data(path) if path.endswith(".jsonl") else None
    return text_windows(parse_source(f"{file or path}{at}{part}", "report"), tokenizer, LENGTH)


def text_to_learn(tokenizer: Tokenizer, count: int, seed: int, kinds: dict[str, float] | None = None) -> Text:
    """Windows of several kinds in these shares, in random order, of the datasets of a kind alike."""
    chance, by_kind = torch.Generator().manual_seed(seed), {}
    for kind, share in (kinds or {kind: share for kind, (share, _) in LEARNT.items()}).items():
        windows = torch.cat([windows_of(name, tokenizer) for name in LEARNT[kind][1]])
        by_kind[kind] = windows[torch.randperm(len(windows), generator=chance)][: round(share * count)]
    return Text.mixed(by_kind)


# Making


def split_channels(active: Tensor, experts: int, seed: int) -> Tensor:
    """[experts, channels of one], by balanced k-means of the directions of [tokens, channels], the activity."""
    directions = functional.normalize(active - active.mean(0), dim=0).T
    chance = torch.Generator().manual_seed(seed)
    size, groups = len(directions) // experts, torch.randperm(len(directions), generator=chance).view(experts, -1)
    for _ in range(8):
        centres = functional.normalize(directions[groups].mean(1), dim=1)
        nearness = directions @ centres.T
        best = nearness.topk(2, dim=1).values
        room, chosen = [size] * experts, list[list[int]]([] for _ in range(experts))
        for channel in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            expert = next(e for e in nearness[channel].argsort(descending=True).tolist() if room[e])
            chosen[expert].append(channel)
            room[expert] -= 1
        groups = torch.tensor(chosen).sort(1).values
    return groups


def empty_mixture(dense: PreTrainedModel, experts: int, active: int) -> MixtralForCausalLM:
    """A mixture with the attention, norms and embeddings of a dense model of the Llama family."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    given = {name: getattr(dense.config, name) for name in names}
    width = dense.config.intermediate_size // experts
    config = MixtralConfig(**given, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=active)
    resolve(config)
    mixture = MixtralForCausalLM(config).to(torch.float32)
    missing = mixture.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".mlp." in name for name in missing), missing
    mixture.tie_weights()
    return mixture.eval()


def fill_experts(layer: Any, dense_layer: Any, groups: Tensor, scale: float) -> None:
    """The channels of a feed-forward as experts, with down projections that many times as large."""
    experts, dense = layer.mlp.experts, dense_layer.mlp
    gate, up = dense.gate_proj.weight[groups], dense.up_proj.weight[groups]
    experts.gate_up_proj.data.copy_(torch.cat([gate, up], 1))
    experts.down_proj.data.copy_(scale * dense.down_proj.weight.T[groups].transpose(1, 2))


def solve(inputs: Tensor, targets: Tensor, damping: float = 0.01) -> Tensor:
    """[outputs, inputs]: ridge regression, damped by a share of the mean square of the inputs."""
    second = inputs.T @ inputs
    second.diagonal().add_(damping * second.diagonal().mean())
    return torch.cholesky_solve(inputs.T @ targets, torch.linalg.cholesky(second)).T


@torch.inference_mode()
def fit(dense: PreTrainedModel, mixture: MixtralForCausalLM, windows: Tensor, seed: int) -> None:
    """Splits the channels, fits routers and down projections: layer by layer, on the states of the mixture so far."""
    batches, active = windows.split(16), mixture.config.num_experts_per_tok
    fast = copy_in_dtype(dense, torch.bfloat16)
    (of_dense, calls), (states, calls_of_mixture) = (
        zip(*enter_layers(m, batches), strict=True) for m in (fast, mixture)
    )
    of_dense, states = [*of_dense], [*states]
    for index, (layer, dense_layer) in enumerate(zip(decoder_layers(mixture), decoder_layers(dense), strict=True)):
        experts, feed = layer.mlp.experts, dense_layer.mlp
        read, middle = list[Tensor](), list[Tensor]()
        # The input and the output of the norm before the experts, which add nothing yet.
        norm, plain, layer.mlp.forward = layer.post_attention_layernorm, layer.mlp.forward, torch.zeros_like
        hook = norm.register_forward_hook(partial(_note, middle, read))
        for number, state in enumerate(states):
            calls_of_mixture[number][index].run(layer, state)
            of_dense[number] = calls[number][index].run(decoder_layers(fast)[index], of_dense[number])
        hook.remove()
        layer.mlp.forward = plain
        inputs, before, wanted = (torch.cat(parts).float().flatten(0, 1) for parts in (read, middle, of_dense))
        channels = functional.silu(inputs @ feed.gate_proj.weight.T) * (inputs @ feed.up_proj.weight.T)
        sizes = channels.abs() * feed.down_proj.weight.norm(dim=0)
        least = sizes.kthvalue(round((1 - ACTIVE_CHANNELS) * sizes.shape[1]), dim=1, keepdim=True).values
        groups = split_channels((sizes > least).float()[::3], len(experts.down_proj), seed)
        fill_experts(layer, dense_layer, groups, active)
        # The router predicts the sizes of the outputs of experts, half on the way to those relative to their means.
        down = experts.down_proj / active
        norms = torch.stack([(channels[:, own] @ of.T).norm(dim=1) for own, of in zip(groups, down, strict=True)], 1)
        target = norms / norms.mean(1, keepdim=True)
        target = target / target.mean(0).sqrt()
        layer.mlp.gate.weight.data.copy_(solve(inputs, target - target.mean(1, keepdim=True)))
        _, weights, chosen = layer.mlp.gate(inputs)
        # Of a token, the channels of its experts times their weights, in the order of the experts.
        by_expert = torch.zeros(len(inputs), len(groups)).scatter_(1, chosen, weights.float())
        sent = channels[:, groups.flatten()] * by_expert.repeat_interleave(groups.shape[1], 1)
        first = experts.down_proj.transpose(0, 1).flatten(1)
        size = wanted.norm(dim=1, keepdim=True)
        change = solve(sent / size, (wanted - before - sent @ first.T) / size)
        corrected = (first + change).view(len(first), len(groups), -1).transpose(0, 1)
        experts.down_proj.data.copy_(corrected)
        after = before + sent @ (first + change).T
        states = [*after.view(-1, LENGTH, after.shape[1]).split(16)]
        print(f"layer {index}: relative error {((wanted - after).norm(dim=1) / size[:, 0]).mean():.3f}", flush=True)


def _note(before: list[Tensor], after: list[Tensor], _: object, inputs: tuple[Tensor], output: Tensor) -> None:
    before.append(inputs[0])
    after.append(output)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """[...]: of predictions, [..., vocabulary], in nats."""
    known = teacher.float().log_softmax(-1)
    return (known.exp() * (known - student.float().log_softmax(-1))).sum(-1)


def run_all(experts: Any, state: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The forward pass of experts, in one product for all: faster to train than small ones for each."""
    by_expert = torch.zeros(len(state), len(experts.down_proj), dtype=state.dtype).scatter(1, chosen, weights.to(state))
    both = functional.linear(state, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (by_expert.shape[1], 2, -1))
    channels = functional.silu(both[:, :, 0]) * both[:, :, 1] * by_expert[..., None]
    return channels.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


def train(
    mixture: MixtralForCausalLM, dense: PreTrainedModel, text: Tensor, rate: float, balance: float
) -> dict[str, Any]:
    """Trains experts, routers and norms by the divergence from the dense model at every second token, by its hidden
    states, and towards balanced experts in each layer. Computes in bfloat16, with weights kept in float32."""
    fast, teacher = copy_in_dtype(mixture, torch.bfloat16).train(), copy_in_dtype(dense, torch.bfloat16)
    trained = [name for name, _ in mixture.named_parameters() if ".mlp." in name or "norm" in name]
    for name, parameter in fast.named_parameters():
        parameter.requires_grad_(name in trained)
    for layer in decoder_layers(fast):
        layer.mlp.experts.forward = partial(run_all, layer.mlp.experts)
    masters = [mixture.get_parameter(name) for name in trained]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches, begun, log = text.split(WINDOWS_PER_STEP), time.monotonic(), list[float]()
    config = mixture.config
    for step, batch in enumerate(batches):
        wanted: dict[str, Any] = {"logits_to_keep": torch.arange(step % 2, LENGTH, 2), "output_hidden_states": True}
        with torch.no_grad():
            known = teacher(batch, use_cache=False, **wanted)
        output = fast(batch, use_cache=False, output_router_logits=True, **wanted)
        lost = divergence(output.logits, known.logits).mean()
        pairs = zip(output.hidden_states[1:], known.hidden_states[1:], strict=True)
        off = sum(((own - of).square().sum(-1) / of.square().sum(-1)).float().mean() for own, of in pairs)
        counts = config.num_local_experts, config.num_experts_per_tok
        uneven = sum(load_balancing_loss_func((logits,), *counts) for logits in output.router_logits)
        (lost + (STATES * off + balance * uneven) / config.num_hidden_layers).backward()
        for master, name in zip(masters, trained, strict=True):
            given = fast.get_parameter(name)
            master.grad, given.grad = given.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, name in zip(masters, trained, strict=True):
                fast.get_parameter(name).copy_(master)
        log.append(lost.item())
        if step % 5 == 4:
            print(f"step {step + 1} of {len(batches)}: {sum(log[-5:]) / 5:.4f} nats", flush=True)
    return {"tokens": text.numel(), "seconds": round(time.monotonic() - begun), "kl": log}


def reports(tokenizer: Tokenizer, windows: int) -> dict[str, Tensor]:
    """The text that perplexity is reported on."""
    return {name: evenly_spaced(windows_of(name, tokenizer), windows) for name in TEXTS}


def perplexities(model: PreTrainedModel, texts: dict[str, Tensor]) -> dict[str, float]:
    return {name: measure_perplexity(model, windows, name).perplexity for name, windows in texts.items()}


@app.command
def make(
    *,
    output: Path,
    model: str = "smollm2",
    experts: int = 8,
    active: int = 2,
    seed: int = 0,
    steps: int = 140,
    start: Path | None = None,
    reported: int = 48,
) -> None:
    """Makes a mixture of a dense model, or trains one further, and made.json with what it is."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, dense = load_tokenizer(find_model(model)), load_model(find_model(model), "float32")
    texts = reports(tokenizer, reported)
    text = text_to_learn(tokenizer, FITTED + steps * WINDOWS_PER_STEP, seed).windows
    if start:
        mixture: Any = open_model(find_model(str(start / "mixture")), "float32")
    else:
        mixture = empty_mixture(dense, experts, active)
        check_split(dense, mixture, text[:2])
        fit(dense, mixture, text[:FITTED], seed)
    models = {"dense": dense, "before training": mixture}
    told = {name: perplexities(copy_in_dtype(of, torch.bfloat16), texts) for name, of in models.items()}
    trained = train(mixture, dense, text[FITTED:][: steps * WINDOWS_PER_STEP], *(FURTHER if start else NEW))
    save_checkpoint(copy_in_dtype(mixture, torch.bfloat16), tokenizer, output / "mixture")
    told["mixture"] = perplexities(open_model(find_model(str(output / "mixture"))), texts)
    sha = hashlib.sha256((output / "mixture" / "model.safetensors").read_bytes()).hexdigest()
    names = {"experts": mixture.config.num_local_experts, "active": mixture.config.num_experts_per_tok, "seed": seed}
    about = names | {"start": start and start.name, "perplexity": told, "sha256": sha} | trained
    (output / "made.json").write_text(json.dumps(about, indent=2))


@torch.inference_mode()
def check_split(dense: PreTrainedModel, mixture: MixtralForCausalLM, windows: Tensor) -> None:
    """With all experts active and equal weights, any split is the dense model."""
    count, active = mixture.config.num_local_experts, mixture.config.num_experts_per_tok
    for layer, dense_layer in zip(decoder_layers(mixture), decoder_layers(dense), strict=True):
        width = dense_layer.mlp.down_proj.weight.shape[1]
        fill_experts(layer, dense_layer, torch.arange(width).view(count, -1), count)
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.top_k = count
    off = (dense(windows).logits - mixture(windows).logits).abs().max()
    print(f"with all experts, logits differ by {off:.2g} at most", flush=True)
    assert off < 1e-2, off
    for layer in decoder_layers(mixture):
        layer.mlp.gate.top_k = active


# Judging


class Judge:
    """A mixture, the text that rankings read, and what is told of models that are cut out of it."""

    def __init__(self, output: Path, reported: int) -> None:
        self.output, location = output, find_model(str(output / "mixture"))
        self.tokenizer, self.mixture = load_tokenizer(location), open_model(location)
        self.structure, self.texts = build_structure(self.mixture), reports(self.tokenizer, reported)
        windows = {kind: windows_of(name, self.tokenizer) for kind, name in KINDS.items()}
        self.kinds = {kind: evenly_spaced(of, reported // 3) for kind, of in windows.items()}
        self.known = {kind: self.predictions(self.mixture, windows) for kind, windows in self.kinds.items()}
        self.seed = 100 + json.loads((output / "made.json").read_text())["seed"]
        text = text_to_learn(self.tokenizer, 96, self.seed)
        self.objective, self.pool = (text.part(p for p in range(96) if (p % 3 == 0) is of) for of in (True, False))

    @torch.inference_mode()
    def predictions(self, model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
        """Logits at every second token, batch by batch."""
        place = torch.arange(1, LENGTH, 2)
        return [model(part, use_cache=False, logits_to_keep=place).logits for part in windows.split(8)]

    def tell(self, model: PreTrainedModel) -> dict[str, Any]:
        """The losses of a model window by window, and its divergence from the mixture by kind."""
        kl: dict[str, list[float]] = {}
        for kind, known in self.known.items():
            pairs = zip(self.predictions(model, self.kinds[kind]), known, strict=True)
            kl[kind] = [float(row.mean()) for mine, theirs in pairs for row in map(divergence, mine, theirs)]
        losses = {name: measure_perplexity(model, windows, name).losses for name, windows in self.texts.items()}
        return {"losses": losses, "kl": kl}

    def scores(self) -> dict[str, Tensor]:
        """[groups], by the name of the ranking."""
        path, structure, scores = self.output / "statistics.safetensors", self.structure, dict[str, Tensor]()
        if not path.exists():
            measure(self.mixture, structure, self.pool.windows).save(path)
        self.statistics = Statistics.load(path)
        for name, terms in RANKED_BY.items():
            point = MetricPoint(weights=dict.fromkeys(terms, 1.0))
            scores[name] = score_groups(self.statistics, structure, point)
        scores["REAP × counts"] = scores["REAP"] * scores["counts"]
        for kind in ("prose", "code"):
            text = text_to_learn(self.tokenizer, len(self.pool), self.seed, {kind: 1.0})
            tokens, output = measure_routing(self.mixture, structure, text.windows)
            scores |= {f"counts, {kind} alone": tokens, f"REAP, {kind} alone": output}
        for number in range(3):
            chance = torch.Generator().manual_seed(number)
            scores[f"random {number}"] = torch.rand(structure.group_offsets[-1], generator=chance)
        return scores

    def searched(self, share: float) -> Tensor:
        """Scores of the best candidate of the search of `prune`, whose other terms are zero for experts."""
        structure, windows, counts = self.structure, self.objective.windows, kept(self.structure, share)
        others = ("removal_error", "elimination_error", "tempered_error", "conditional_variance")
        statistics = replace(self.statistics, **dict.fromkeys(others, torch.zeros(structure.group_offsets[-1])))
        space = ExtendedSpace(build_subset_family(statistics, structure, counts), 10, 0, experts="routing")
        losses = window_losses(self.mixture, windows)
        objective = Objective(self.mixture, structure, statistics, counts, windows, losses)
        search = Search(space, objective, TRIALS, 0, StudyFile(self.output / "study.jsonl", f"{share}"))
        search.run()
        best = search.result().best
        print(f"search, {share}: {best.point.weights}", flush=True)
        return score_groups(statistics.select(best.samples), structure, best.point)

    def without_channels(self, share: float) -> PreTrainedModel:
        """The mixture without this share of the channels of every expert, compensated."""
        structure, moments = build_structure(self.mixture, experts="channel"), StoredMoments(self.output / "moments")
        blocks = [number for number, block in enumerate(structure.blocks) if block.kind != "heads"]
        if not moments.folder.exists():
            moments.folder.mkdir()
            for number, of_block in measure_moments(self.mixture, structure, self.pool.windows, blocks):
                of_block.save(moments.path(number))
        errors = removal_errors(self.mixture, structure, moments, variance=False)["tempered_error"]
        return prune_model(self.mixture, structure, make_plan(structure, errors, kept(structure, share)), moments)

    def healed(
        self, cut: PreTrainedModel, weights: TrainedWeights, tokens: int, folder: Path
    ) -> PreTrainedModel | None:
        """A cut model after the training of `prune --heal`, with the mixture as teacher."""
        save_checkpoint(cut, self.tokenizer, folder / "cut")
        learnt, held_out = text_to_learn(self.tokenizer, tokens // LENGTH + 14, self.seed + 1).held_out(14)
        length = length_of_windows(LENGTH, len(learnt), None)
        options = healing_options(weights, tokens, length, 0, torch.device("cpu"), False)
        read, start = partial(open_model, find_model(str(folder / "cut"))), start_of_windows(self.tokenizer, length)
        model, record = heal(read, learnt, held_out, self.mixture, options, folder / "training", start=start)
        print(folder.name, record.losses_by_rate, record.loss_before, flush=True)
        return model


def kept(structure: Structure, share: float) -> list[int]:
    """The groups that blocks keep: all but this share of the experts, or of the channels of every expert."""
    rounded = [block.strata * round(block.groups * (1 - share) / block.strata) for block in structure.blocks]
    return [b.groups if b.kind == "heads" else count for b, count in zip(structure.blocks, rounded, strict=True)]


@app.command
def judge(
    *,
    output: Path,
    shares: tuple[float, ...] = (0.5, 0.25),
    rankings: tuple[str, ...] = (),
    heal_tokens: int = 0,
    weights: TrainedWeights = "ia3",
    reported: int = 48,
) -> None:
    """Cuts a mixture in every way, or by some rankings, and adds to judged.jsonl what that does not hold yet."""
    judged, path = Judge(output, reported), output / "judged.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done, scores = {tuple(json.loads(line)["cell"]) for line in lines}, judged.scores()

    def cut(name: str, share: float) -> PreTrainedModel:
        if name == "channels":
            return judged.without_channels(share)
        ranked = judged.searched(share) if name == "search" else scores[name]
        plan = make_plan(judged.structure, ranked, kept(judged.structure, share))
        return prune_model(judged.mixture, judged.structure, plan)

    cells = [("mixture", 0.0), *((name, share) for share in shares for name in rankings or [*scores, *OTHERS])]
    for name, share in cells:
        trained = f"{weights}, {heal_tokens:,}" if heal_tokens and share else ""
        if (share, name, trained) in done:
            continue
        model: PreTrainedModel | None = cut(name, share) if share else judged.mixture
        if trained and model is not None:
            model = judged.healed(model, weights, heal_tokens, output / f"{name}-{share}-{weights}")
        if model is not None:
            entry = {"cell": (share, name, trained), **judged.tell(model)}
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(entry["cell"], [round(fmean(of), 3) for of in (entry["losses"] | entry["kl"]).values()], flush=True)


@app.command
def table(*folders: Path) -> None:
    """Prints the rows of research/results/mixtures.json as JSON: perplexities as multiples of the mixture's own."""
    rows = []
    for folder in folders:
        cells = {tuple(entry["cell"]): entry for entry in map(json.loads, (folder / "judged.jsonl").open())}
        names = {(share, re.sub(r" \d$", "", name), trained): 0 for share, name, trained in cells}
        for share, name, trained in names:
            same = [
                of
                for key, of in cells.items()
                if key in {(share, name, trained), *((share, f"{name} {n}", "") for n in range(3))}
            ]
            nats = {text: torch.tensor([of["losses"][text] for of in same]).mean(0) for text in TEXTS}
            before, best = cells[0.0, "mixture", ""]["losses"], cells.get((share, "counts", trained), same[0])["losses"]
            over = torch.cat([nats[text] - torch.tensor(best[text]) for text in TEXTS])
            row = {"mixture": folder.name, "removed": f"{share:.0%}", "ranking": name, "trained": trained}
            row["times"] = [round(math.exp(nats[text].mean() - fmean(before[text])), 3) for text in TEXTS]
            row["kl"] = [round(fmean(fmean(of["kl"][kind]) for of in same), 3) for kind in KINDS]
            row["over counts"] = f"{over.mean():.2f} ± {over.std() / len(over) ** 0.5:.2f}"
            rows.append(row)
    print(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    torch.manual_seed(0)
    app()

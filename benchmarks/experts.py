"""Which experts of a mixture to remove: by importance, by how often they are used, or at random.

    python benchmarks/experts.py --text wiki.valid.raw

Trains a small Mixtral on the bytes of a text (the first eight tenths), measures it on the ninth, removes experts, and
reports the loss on the last. The same number of parameters is taken from the channels of all experts, with and without
compensation. Then two ways to make up for what was removed are tried: a scale for the kept experts,
fitted by least squares to the outputs of the dense layer, and merging each removed expert into the nearest kept one,
weighted by how often they are used.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path

import torch
from cyclopts import run as run_benchmark
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from adapruner.families.inference import infer_architecture
from adapruner.importance import MetricPoint, score_groups
from adapruner.measurement import Statistics, measure, measure_moments
from adapruner.models import using_architecture
from adapruner.planning import make_plan
from adapruner.structure import Structure, build_structure
from adapruner.surgery import Compensation, prune_model
from machine import describe

EXPERTS, LENGTH = 8, 128
METRICS = {
    "frequency": {"expert_frequency": 1.0},
    "Taylor": {"fine_first": 1.0},
    "REAP": {"expert_output": 1.0},
    "Taylor + REAP": {"fine_first": 1.0, "expert_output": 1.0},
}


def main(*, text: Path, steps: int = 1200, samples: int = 48, random_draws: int = 10, seed: int = 0) -> None:
    """
    Args:
        text: A file.
        steps: Of training, 16 windows of 128 bytes each.
        samples: Windows to measure on.
        random_draws: Whose losses are averaged.
    """
    print(describe())
    tokens = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    train, measured, held_out = (
        windows[: len(windows) * 8 // 10],
        windows[len(windows) * 8 // 10 : len(windows) * 9 // 10],
        windows[len(windows) * 9 // 10 :],
    )
    model = trained(train, steps, seed)
    held_out = held_out[:: max(1, len(held_out) // 256)]
    measured = measured[:: max(1, len(measured) // samples)][:samples]
    print(f"dense: {loss(model, held_out):.4f} nats per byte after {steps} steps")
    with using_architecture(infer_architecture(model.config)):
        structure = build_structure(model)
        seen = measure(model, structure, measured)
        for kept in (6, 4):
            print(f"\n{kept} of {EXPERTS} experts of every layer are kept")
            draws = [torch.rand(structure.group_offsets[-1], generator=generator(draw)) for draw in range(random_draws)]
            losses = [loss(cut(model, structure, draw, kept), held_out) for draw in draws]
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
            print(f"  {'random':14} {statistics.fmean(losses):.4f} (mean of {random_draws}, {spread})")
            for name, weights in METRICS.items():
                scores = score_groups(seen, structure, MetricPoint(weights=weights))
                print(f"  {name:14} {loss(cut(model, structure, scores, kept), held_out):.4f}")
            pruned = cut(model, structure, scores, kept)
            print(f"  {'… scaled':14} {loss(scaled(model, pruned, measured), held_out):.4f}")
            print(f"  {'… merged':14} {loss(merged(model, structure, seen, scores, kept), held_out):.4f}")
        for kept in (6, 4):
            print(f"\n{kept} of {EXPERTS} channels of every expert are kept")
            for name, value in channels_cut(model, measured, held_out, kept / EXPERTS).items():
                print(f"  {name:14} {value:.4f}")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(windows: Tensor, steps: int, seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=LENGTH,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    drawn = generator(seed)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (16,), generator=drawn)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.config.output_router_logits = False
    model.eval()
    return model


@torch.no_grad()
def loss(model: PreTrainedModel, windows: Tensor) -> float:
    return statistics.fmean(float(model(batch, labels=batch).loss) for batch in windows.split(32))


def counts(structure: Structure, kept: int) -> list[int]:
    return [kept if block.kind == "experts" else block.groups for block in structure.blocks]


def cut(model: MixtralForCausalLM, structure: Structure, scores: Tensor, kept: int) -> MixtralForCausalLM:
    pruned = copy.deepcopy(prune_model(model, structure, make_plan(structure, scores, counts(structure, kept))))
    assert isinstance(pruned, MixtralForCausalLM)
    return pruned


def channels_cut(model: MixtralForCausalLM, measured: Tensor, held_out: Tensor, share: float) -> dict[str, float]:
    """Losses when the same share of the channels of every expert is kept."""
    structure = build_structure(model, experts="channel")
    seen, moments = measure(model, structure, measured), dict(measure_moments(model, structure, measured))
    keeps = [int(share * block.groups) if block.experts else block.groups for block in structure.blocks]
    losses = {}
    for name, weights in {"Taylor": {"fine_first": 1.0}, "activation": {"activation_norm": 1.0}}.items():
        scores = score_groups(seen, structure, MetricPoint(weights=weights))
        plan = make_plan(structure, scores, keeps)
        for form, compensation in (("", None), ("compensated", Compensation("least-squares", moments))):
            losses[f"{name} {form}"] = loss(prune_model(model, structure, plan, compensation), held_out)
    return losses


@torch.no_grad()
def scaled(model: MixtralForCausalLM, pruned: MixtralForCausalLM, windows: Tensor) -> MixtralForCausalLM:
    """Every layer's experts, by the factor with which they come nearest to those of the dense layer on its inputs."""
    for layer, small in zip(model.model.layers, pruned.model.layers, strict=True):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.mlp.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        model(windows)
        hook.remove()
        ((inputs, wanted),) = seen
        given = small.mlp(inputs)
        small.mlp.experts.down_proj.mul_((wanted * given).sum() / given.square().sum())
    return pruned


@torch.no_grad()
def merged(
    model: MixtralForCausalLM, structure: Structure, seen: Statistics, scores: Tensor, kept: int
) -> MixtralForCausalLM:
    """With every removed expert added to the one of the most similar row of the router."""
    plan = make_plan(structure, scores, counts(structure, kept))
    pruned = cut(model, structure, scores, kept)
    assert seen.routed_share is not None
    share = seen.routed_share.mean(0)
    for index, (block, own) in enumerate(zip(structure.blocks, plan.blocks, strict=True)):
        if block.kind != "experts":
            continue
        dense, small = (each.model.layers[block.layer].mlp for each in (model, pruned))
        used = share[structure.group_offsets[index] :][: block.groups]
        rows = torch.nn.functional.normalize(dense.gate.weight, dim=1)
        nearest = {expert: own.kept[int((rows[list(own.kept)] @ rows[expert]).argmax())] for expert in range(EXPERTS)}
        for place, expert in enumerate(own.kept):
            members = [one for one, target in nearest.items() if target == expert]
            weights = used[members] / used[members].sum()
            for name in ("gate_up_proj", "down_proj"):
                stacked = getattr(dense.experts, name)[members]
                getattr(small.experts, name)[place] = (stacked * weights[:, None, None]).sum(0)
    return pruned


if __name__ == "__main__":
    run_benchmark(main)

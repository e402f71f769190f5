"""Every command runs on a GPU as it does on the CPU, for every kind of family, dtype and way of loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import adapruner
from adapruner.planning import PruningPlan
from device.client import Device
from device.options import LAYER_WISE, SMALL_RUN, pruning
from device.results import only_json
from device.whole_run import compare


@dataclass(frozen=True)
class Case:
    """A run of `adapruner prune`: pairs of family, dtype, hardware and options that all come up."""

    family: str
    dtype: str
    layer_wise: bool = False
    native_bfloat16: bool = True
    # Words of the options below.
    options: dict[str, object] = field(default_factory=dict)
    recovery: dict[str, object] | None = None

    def __str__(self) -> str:
        how = ["layer-wise"] * self.layer_wise + ["emulated"] * (not self.native_bfloat16)
        return "-".join([self.family, self.dtype, *how, *map(str, self.options)])


FULL, DISTILLED = {"train": "full", "label_weight": 1}, {"label_weight": 0.5}
SAMPLE = [Case("llama", "float32", recovery={})]
# Whole experts, as many in every layer, are steps of the ratio.
STEPS = {"mixtral": 0.1955, "qwen3_moe": 0.1872, "jamba": 0.1201, "granitemoehybrid": 0.1702, "qwen3_next": 0.1133}
STEPS["deepseek_v3"] = 0.1327
CHANNELS = {"expert_granularity": "channel", "ratio": 0.1}
CASES = [
    Case("llama", "bfloat16", True, False, {"selection": "kl"}, FULL),
    Case("llama", "float16", False, False, {"compensation": "least-squares-bias"}, {}),
    Case("llama", "float32", True, True, {"head_granularity": "query-head"}, DISTILLED),
    Case("phi3", "bfloat16", False, True, {"layout": "uniform"}, DISTILLED),
    Case("phi3", "float16", True, True, {"whole": "attention", "ratio": 0.3}),
    Case("gpt_neox", "float32", True, False, {"terms": "vector-wise"}, {}),
    Case("gpt_neox", "float16", False, True, {"whole": "feed-forward", "ratio": 0.3}, FULL | DISTILLED),
    Case("gpt2", "float32", False, False, {"space": "paper"}, {}),
    Case("gpt2", "bfloat16", True, True, {"compensation": "bias"}, {}),
    Case("mixtral", "float16", False, True, {}, {}),
    Case("mixtral", "bfloat16", False, False, CHANNELS, {}),
    Case("qwen3_moe", "float32", False, True, {"whole": "layer"}),
    Case("qwen3_moe", "bfloat16", False, False, CHANNELS, FULL),
    Case("jamba", "float32", False, True, {}, {}),
    Case("jamba", "bfloat16", False, False),
    Case("granitemoehybrid", "float32", True, False, CHANNELS),
    Case("granitemoehybrid", "float16", True, True),
    Case("granitemoehybrid", "bfloat16", False, True, {}, {}),
    # PEFT puts no adapters on it.
    Case("qwen3_next", "float32", False, True, {}, FULL),
    Case("qwen3_next", "float16", False, False, CHANNELS),
    Case("lfm2", "bfloat16", False, True, {"whole": "attention"}, DISTILLED),
    Case("lfm2", "float32", True, True),
    Case("gemma2", "bfloat16", False, True, {}, {}),
    Case("bloom", "float16", True, True),
    Case("deepseek_v3", "float32", False, True),
]


def command(case: Case, model: Path, text: Path, output: Path, place: str) -> list[object]:
    steps = {"ratio": STEPS[case.family]} if case.family in STEPS else {}
    options = SMALL_RUN | steps | (LAYER_WISE if case.layer_wise else {}) | case.options
    if options.get("layout") == "uniform":
        options = {name: value for name, value in options.items() if name not in ("protect_first", "protect_last")}
    if options.get("space") == "paper" or options.get("layout") == "uniform":
        options.pop("level_rounds")
    return [*pruning(model, text, output, options, case.recovery), "--evaluate", text, "--device", place]


@pytest.mark.parametrize(
    "case", [*SAMPLE, *(pytest.param(case, marks=pytest.mark.device_matrix) for case in CASES)], ids=str
)
def test_pruning_on_a_gpu_gives_the_plan_of_the_cpu(
    case: Case, device: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model, plans = family(case.family, case.dtype), {}
    for place in ("cuda", "cpu"):
        output = tmp_path / place
        outcome = device.run(*command(case, model, text_file, output, place), native_bfloat16=case.native_bfloat16)
        only_json(outcome)
        plans[place] = PruningPlan.load(output / "plan.json").hash
        on_device = {stage.name for stage in outcome.stages if stage.peak}
        assert on_device - {"recovering"} if place == "cuda" else not on_device - {"recovering"}
        assert outcome.left == 0, "memory of the device is held after the run"
    # In narrower dtypes sums over other batches differ.
    if case.dtype == "float32":
        assert plans["cuda"] == plans["cpu"]
    assert adapruner.load(tmp_path / "cuda" / ("model" if case.recovery is None else "recovered")).num_parameters() > 0


@pytest.mark.device_matrix
@pytest.mark.timeout(1200)
def test_a_whole_run_with_the_default_options_gives_the_plan_of_the_cpu(
    device: Device, family: Callable[..., Path], tmp_path: Path
) -> None:
    """A model with enough layers and channels for them, and text for all windows, of which words follow each other as
    in a random walk."""
    model = family("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=8, max_position_embeddings=512)
    generator, text = torch.Generator().manual_seed(3), tmp_path / "text.txt"
    walks = torch.randint(-4, 5, (900, 300), generator=generator).cumsum(1) % 90
    text.write_text("\n\n".join(" ".join(f"w{word}" for word in walk) for walk in walks.tolist()))
    agreement = compare(device, [model, "--calibration", text], tmp_path)
    assert agreement["same_plan"]
    for name, perplexity in agreement["perplexity"]["cpu"].items():
        assert agreement["perplexity"]["cuda"][name] == pytest.approx(perplexity, rel=1e-4)

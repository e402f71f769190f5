"""`prune` gives the plan of the CPU on a GPU: in every dtype, in memory and layer by layer, with every kind of
layers."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import adapruner
from adapruner.budget.plan import PruningPlan
from device.client import LAYER_WISE, SMALL_RUN, only_json, pruning


@dataclass(frozen=True)
class Case:
    """A run of `adapruner prune`: pairs of family, dtype, hardware and options that all come up."""

    family: str
    dtype: str
    layer_wise: bool = False
    native_bfloat16: bool = True
    # Words of the options below.
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        how = ["layer-wise"] * self.layer_wise + ["emulated"] * (not self.native_bfloat16)
        return "-".join([self.family, self.dtype, *how, *map(str, self.options)])


# On GPUs with bfloat16, trials and costs are computed in it; cuts of a random model cost less than its rounding.
SAMPLE = Case("llama", "float32", native_bfloat16=False)
# Whole experts, as many in every layer, are steps of the ratio.
STEPS = {"mixtral": 0.1955, "jamba": 0.1201}
CASES = [
    Case("llama", "bfloat16", True, False, {}),
    Case("llama", "float32", True, False, {"head_granularity": "query-head"}),
    Case("phi3", "bfloat16", False, True, {"layout": "uniform"}),
    Case("phi3", "float16", True, True, {"remove_attention": True, "ratio": 0.3}),
    Case("gpt2", "float32", False, False, {"space": "paper"}),
    Case("mixtral", "bfloat16", False, False, {"expert_granularity": "channel", "ratio": 0.1}),
    Case("jamba", "float32", False, True),
    Case("jamba", "float16", True, True),
]


def command(case: Case, model: Path, text: Path, output: Path, place: str) -> list[object]:
    steps = {"ratio": STEPS[case.family]} if case.family in STEPS else {}
    options = SMALL_RUN | steps | (LAYER_WISE if case.layer_wise else {}) | case.options
    if options.get("layout") == "uniform":
        options = {name: value for name, value in options.items() if name not in ("protect_first", "protect_last")}
    return [*pruning(model, text, output, options), "--evaluate", text, "--device", place]


@pytest.mark.parametrize(
    "case", [SAMPLE, *(pytest.param(case, marks=pytest.mark.device_matrix) for case in CASES)], ids=str
)
def test_pruning_on_a_gpu_gives_the_plan_of_the_cpu(case, device, family, text_file, tmp_path):
    model, plans = family(case.family, case.dtype), {}
    for place in ("cuda", "cpu"):
        output = tmp_path / place
        outcome = device.run(*command(case, model, text_file, output, place), native_bfloat16=case.native_bfloat16)
        only_json(outcome)
        plans[place] = PruningPlan.load(output / "plan.json").hash
        on_device = {stage.name for stage in outcome.stages if stage.peak}
        assert on_device if place == "cuda" else not on_device
        assert outcome.left == 0, "memory of the device is held after the run"
    # In narrower dtypes sums over other batches differ.
    if case.dtype == "float32":
        assert plans["cuda"] == plans["cpu"]
    assert adapruner.load(tmp_path / "cuda" / "model").num_parameters() > 0

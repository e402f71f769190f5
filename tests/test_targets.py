"""Targets in bytes and seconds: the ratio that meets them, what is refused, and a run that meets one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import adapruner
from adapruner.costs import Latencies
from adapruner.errors import AdaPrunerError
from adapruner.graph import RunFolder
from adapruner.models import empty_model
from adapruner.planning import Budget, BudgetError, Costs, Profile, Size, Speed, Target, kept_counts
from adapruner.report import render_report
from adapruner.report._command import command
from adapruner.run.preview import estimate, preview
from adapruner.structure import Structure, build_structure
from run_helpers import QUICK

OPTIONS = {name: value for name, value in QUICK.items() if name != "ratio"}


@pytest.fixture
def structure(make_model: Callable[..., PreTrainedModel]) -> Structure:
    """Four layers with 256 channels."""
    config = make_model().config
    config.intermediate_size = 256
    return build_structure(empty_model(config))


def target(costs: Costs, most: float, structure: Structure) -> Target:
    return Target(Size(f"{most:.0f}"), costs, costs([block.groups for block in structure.blocks]))


def steps_of(structure: Structure) -> Costs:
    """Channels cost more where they are no multiple of 8, as in a quantized file; later layers cost more."""

    def costs(counts: Sequence[int]) -> float:
        return 500.0 + sum(
            (1 + block.layer) * count * (1.25 if count % 8 else 1.0)
            for block, count in zip(structure.blocks, counts, strict=True)
        )

    return costs


@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
@pytest.mark.parametrize("head_share", [0.0, 0.7])
def test_the_ratio_is_the_one_that_trying_all_finds(structure: Structure, share: float, head_share: float) -> None:

    def counts_at(ratio: float) -> list[int]:
        return kept_counts(structure, Budget(ratio, Profile(0, 1), heads=head_share))

    def linear(counts: Sequence[int]) -> float:
        return 1000.0 + sum(3 * count for count in counts)

    aim = target(linear, share * linear([block.groups for block in structure.blocks]), structure)
    costs = {}
    for step in range(1, 1000):
        try:
            costs[step / 1000] = linear(counts_at(step / 1000))
        except BudgetError:
            continue
    best = max(cost for cost in costs.values() if cost <= aim.most)
    found = linear(counts_at(aim.ratio(counts_at)))
    assert min(best, 0.99 * aim.most) <= found <= aim.most


def test_costs_that_rise_in_places_are_met_too(structure: Structure) -> None:
    costs = steps_of(structure)
    aim = target(costs, 0.8 * costs([block.groups for block in structure.blocks]), structure)

    def counts_at(ratio: float) -> list[int]:
        return kept_counts(structure, Budget(ratio, Profile(0, 0)))

    assert 0.99 * aim.most <= costs(counts_at(aim.ratio(counts_at))) <= aim.most


def test_what_cannot_be_met_is_refused_with_the_numbers(structure: Structure) -> None:
    def megabytes(counts: Sequence[int]) -> float:
        return 1e6 * (100 + sum(counts))

    def counts_at(ratio: float) -> list[int]:
        return kept_counts(structure, Budget(ratio, Profile(1, 1), round_to=64))

    dense = 1e-6 * megabytes([block.groups for block in structure.blocks])
    smallest = dense - 2 * (256 - 64)
    refused = {
        1e6 * dense: f"has {dense:,.2f} MB already",
        100e6: f"cannot be reached: {smallest:,.2f} MB at best, .* the dense model has {dense:,.2f} MB",
        1e6
        * (dense - 100): f"not met within 1%: .* come to {dense - 128:,.2f} MB; choose that, or lower `round_to` if",
    }
    for most, message in refused.items():
        with pytest.raises(AdaPrunerError, match=message):
            target(megabytes, most, structure).ratio(counts_at)


@pytest.mark.parametrize(("most", "met"), [(72, 0.22), (65, None)])
def test_steps_that_halving_misses_are_found(structure: Structure, most: float, met: float | None) -> None:
    """11% of the parameters go at a time, and with each percent 1.3% of the cost."""
    between = []

    def counts_at(ratio: float) -> list[int]:
        steps = round(ratio / 0.11)
        between.append(steps == 0 or abs(ratio - 0.11 * steps) > 0.005)
        if between[-1]:
            raise BudgetError("between steps")
        return [steps]

    def costs(counts: Sequence[int]) -> float:
        return 1e6 * (100 - 1.3 * 11 * counts[0])

    aim = Target(Size(f"{most}MB"), costs, 100e6)
    if met:
        assert aim.ratio(counts_at) == pytest.approx(met, abs=0.005)
    else:
        # At the third step.
        with pytest.raises(BudgetError, match=r"not met within 1%: .* come to 57\.10 MB") as refusal:
            aim.ratio(counts_at)
        assert refusal.type is BudgetError
    assert all(between[:15])
    assert not all(between)


def test_a_speed_is_shown_as_a_speed(structure: Structure) -> None:
    def seconds(counts: Sequence[int]) -> float:
        return 1000.0 + sum(counts)

    aim = Target(Speed(100.0), seconds, seconds([block.groups for block in structure.blocks]))
    with pytest.raises(AdaPrunerError, match=r"`target_speed` .* 1\.\d\d times as fast at best"):
        aim.ratio(lambda ratio: kept_counts(structure, Budget(ratio, Profile(1, 1))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "90XB"}, "`target_size` 90XB is not a size: expected a number with a unit, as 400MB"),
        ({"target_memory": "0MB"}, "`target_memory` 0MB must be more than nothing"),
        ({"target_speed": 1.0}, "`target_speed`"),
        ({"target_size": "1MB", "target_speed": 1.2}, "`target_size`, `target_memory` and `target_speed`"),
        ({"target_size": "1MB", "ratio": 0.1}, "`ratio` and `target_size` both say how much is removed"),
        ({"target_speed": 1.2, "target_format": "float16"}, "add `target_size` or `target_memory`"),
        ({"target_size": "1MB", "target_phase": "decode"}, "add `target_speed`"),
        ({"target_size": "1MB", "target_batch": 4}, "add `target_memory` or `target_speed`"),
        ({"target_size": "1MB", "ratio_of": "groups", "space": "paper"}, "`ratio_of` groups needs a ratio"),
        ({"target_speed": 1.2, "layer_wise": True}, "remove `layer_wise`"),
        ({"target_size": "1kB"}, r"`target_size` 1kB cannot be reached: 0\.15 MB at best"),
        ({"target_size": "1GB"}, "`target_size` 1GB: the model has"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], message: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdaPrunerError, match=message):
        adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **OPTIONS | options)
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_a_target_is_that_of_the_ratio_that_meets_it(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    target = {"target_size": str(int(0.87 * (model_folder / "model.safetensors").stat().st_size))}
    options = OPTIONS | {"calibration": str(text_file)}
    previewed = preview(str(model_folder), output=tmp_path / "run", **options, **target)
    needed = estimate(model_folder, **options, **target).memory
    assert needed == previewed.memory == estimate(model_folder, ratio=previewed.ratio, **options).memory
    assert needed != estimate(model_folder, ratio=previewed.ratio / 2, **options).memory


def test_the_speed_of_another_machine_is_not_estimated(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(AdaPrunerError, match="`target_speed` is measured"):
        estimate(model_folder, target_speed=1.2, device="cuda", **OPTIONS)


def test_a_budget_of_the_command_takes_the_place_of_that_of_the_recipe(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("ratio: 0.3\n")
    with pytest.raises(AdaPrunerError, match=r"1kB cannot be reached"):
        adapruner.prune(
            str(model_folder),
            output=tmp_path / "run",
            recipe=tmp_path / "recipe.yaml",
            calibration=str(text_file),
            target_size="1kB",
            **OPTIONS,
        )


def test_a_run_meets_a_size(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = (model_folder / "model.safetensors").stat().st_size
    asked = int(0.87 * dense)
    options = OPTIONS | {"calibration": str(text_file), "target_size": str(asked), "level_rounds": 1}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    written = (result.model_folder / "model.safetensors").stat().st_size
    assert 0.99 * asked <= written <= asked
    outcome = result.result.target
    assert outcome is not None
    assert outcome.reached == outcome.predicted == written / 1e6
    assert (outcome.dense, outcome.asked) == (dense / 1e6, asked / 1e6)
    shown = f"size: asked {asked / 1e6:.2f} MB, predicted {written / 1e6:.2f}"
    assert shown in render_report(RunFolder(result.output), result.result.config)
    line = command(result.result.config, result.output)
    assert f"--target-size {asked}" in line
    assert "--ratio" not in line
    # The same command has nothing to do; a ratio takes the place of the target.
    again = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert again.plan.hash == result.plan.hash
    # Nor has its config: the ratio in it follows from the target.
    found = RunFolder(tmp_path / "run").read_config()
    assert adapruner.prune(output=tmp_path / "run", config=found).plan.hash == result.plan.hash


def test_a_run_meets_a_speed_that_was_measured_before(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that takes a second for every channel, and as long as that for the rest."""

    def measure(structure: Structure, make: Any, layers: int, timer: Any, about: Any, progress: Any) -> Latencies:
        channels = {0: -24.0, 24: 0.0}
        return Latencies(about=about, seconds=200.0, of_layer=30.0, added={"channels": channels, "heads": {3: 0.0}})

    monkeypatch.setattr("adapruner.run.nodes.amount.measure_latencies", measure)
    options = OPTIONS | {"calibration": str(text_file), "target_speed": 1.2, "target_context": 8, "whole": ("none",)}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", head_share=0.0, **options)
    removed = sum(block.groups - len(block.kept) for block in result.plan.blocks if block.kind == "channels")
    assert 1.2 <= 200 / (200 - removed) <= 1.2 / 0.99
    outcome = result.result.target
    assert outcome is not None
    assert outcome.predicted == pytest.approx(200 / (200 - removed))
    assert outcome.reached > 0
    monkeypatch.delattr("adapruner.run.nodes.amount.measure_latencies")
    (tmp_path / "run" / "target.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "empty"))
    assert adapruner.prune(str(model_folder), output=tmp_path / "run", head_share=0.0, **options).plan == result.plan

"""Two GPUs: one process on the second, and a process on each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import adapruner
from device.client import Device, Outcome
from device.options import LAYER_WISE, SMALL_RECOVERY, SMALL_RUN, flags
from device.results import only_json, only_line

pytestmark = pytest.mark.device_matrix


def peaks(outcome: Outcome) -> list[int]:
    """The most bytes that each process held."""
    lines = [line.split() for line in outcome.stderr.splitlines() if line.startswith("rank ")]
    return [int(line[3]) for line in sorted(lines)]


@pytest.mark.parametrize("layer_wise", [False, True])
def test_the_second_gpu_alone_is_used(
    layer_wise: bool, two_devices: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    options = SMALL_RUN | (LAYER_WISE if layer_wise else {})
    outcome = two_devices.run(
        *("prune", family("llama"), "-o", tmp_path / "a", "--calibration", text_file, "--device", "cuda:1", "--json"),
        *flags(options),
    )
    only_json(outcome)
    # Of the first device.
    assert {stage.name: stage.peak for stage in outcome.stages if stage.peak} == {}


def test_training_on_the_second_gpu_alone_says_how(
    two_devices: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    outcome = two_devices.run(
        *("recover", family("llama"), "--data", text_file, "-o", tmp_path / "a", "--device", "cuda:1"),
        *flags(SMALL_RECOVERY),
    )
    assert "CUDA_VISIBLE_DEVICES=1" in only_line(outcome)


def test_there_is_no_third_gpu(two_devices: Device, family: Callable[..., Path], text_file: Path) -> None:
    outcome = two_devices.run("evaluate", family("llama"), "--evaluate", text_file, "--device", "cuda:2")
    assert only_line(outcome).startswith("--device cuda:2: CUDA error: invalid device ordinal")


def test_one_process_of_two_gpus_uses_the_first(
    two_devices: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    arguments = ("recover", family("llama"), "--data", text_file, "-o", tmp_path / "a", *flags(SMALL_RECOVERY))
    assert only_json(two_devices.run(*arguments, "--json"))["steps"] == 3


@pytest.mark.parametrize("train", ["lora", "full"])
def test_two_processes_prune_and_train_together(
    train: str, launch: Callable[..., Outcome], family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    outcome = launch(
        *("prune", family("llama"), "-o", tmp_path / "a", "--calibration", text_file, "--recover", text_file, "--json"),
        *flags(SMALL_RUN),
        *flags(SMALL_RECOVERY | {"train": train}, "recovery."),
    )
    result = only_json(outcome)
    assert result["recovery"]["steps"] == 3
    assert all(peaks(outcome))
    # Every stage is reported once, by the first process.
    lines = [line for line in outcome.stderr.splitlines() if ": done in" in line]
    assert sum(line.startswith("measuring: ") for line in lines) == 1
    assert sum(line.startswith("recovering: ") for line in lines) == 1
    advice = [line for line in outcome.stderr.splitlines() if line.startswith("advice: ")]
    assert len(advice) == len(set(advice))
    assert adapruner.load(tmp_path / "a/recovered").num_parameters() > 0


@pytest.mark.parametrize(("train", "method"), [("lora", "distillation"), ("full", "labels")])
def test_two_processes_recover(
    train: str,
    method: str,
    launch: Callable[..., Outcome],
    family: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    options = SMALL_RECOVERY | {"train": train, "method": method}
    teacher = ["--teacher", family("llama")] if method == "distillation" else []
    arguments = ["--data", text_file, *flags(options), *teacher, "--json"]
    outcome = launch("recover", family("llama"), "-o", tmp_path / "a", *arguments)
    assert only_json(outcome)["steps"] == 3
    assert all(peaks(outcome))
    assert sum(": done in" in line for line in outcome.stderr.splitlines()) == 2
    assert not (tmp_path / "a.training").exists()


def test_a_process_that_runs_out_of_memory_ends_all(
    launch: Callable[..., Outcome], family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    outcome = launch(
        *("recover", family("llama"), "--data", text_file, "-o", tmp_path / "a", *flags(SMALL_RECOVERY)),
        environment={"SIMULATED_CUDA_GIB": "0.0004"},
    )
    assert outcome.code != 0
    assert "adapruner: out of memory" in outcome.stderr


def test_all_weights_are_trained_though_an_attention_is_gone(
    launch: Callable[..., Outcome], two_devices: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """The norm in front of it gets no gradient."""
    options = SMALL_RUN | {"whole": "attention", "ratio": 0.3, "trials": 13}
    arguments = ("prune", family("llama"), "-o", tmp_path / "run", "--calibration", text_file, "--json")
    only_json(two_devices.run(*arguments, *flags(options)))
    plan = adapruner.PruningPlan.load(tmp_path / "run" / "plan.json")
    assert any(not block.kept for block in plan.blocks)
    recovery = flags(SMALL_RECOVERY | {"train": "full"})
    only_json(launch("recover", tmp_path / "run/model", "--data", text_file, *recovery, "--json", "-o", tmp_path / "a"))

"""Two GPUs: one process on the second, and a process on each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adapruner
from device.client import HERE, Device, Outcome
from device.options import LAYER_WISE, SMALL_RECOVERY, SMALL_RUN, flags
from device.results import only_json, only_line

pytestmark = pytest.mark.device_matrix


@pytest.fixture
def launch(two_devices: Device) -> Callable[..., Outcome]:
    """Runs a command in two processes, each with a GPU of its own: memory of the other one cannot be allocated."""

    def run(*arguments: object, environment: dict[str, str] | None = None) -> Outcome:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        done = subprocess.run(
            [sys.executable, *launcher, str(HERE / "rank.py"), *map(str, arguments)],
            env=two_devices.environment() | (environment or {}),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


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


@pytest.fixture
def pruned(two_devices: Device, family: Callable[..., Path], text_file: Path, tmp_path: Path) -> Path:
    """A model whose layers differ."""
    arguments = ("prune", family("llama"), "-o", tmp_path / "run", "--calibration", text_file, "--json")
    only_json(two_devices.run(*arguments, *flags(SMALL_RUN)))
    return tmp_path / "run" / "model"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_sharded_training_saves_the_whole_model(
    train: str, launch: Callable[..., Outcome], pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    """As `accelerate launch --use_fsdp --fsdp_version 2` starts it, against data parallel training."""
    sharded = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    # Products in bfloat16 are rounded elsewhere with FSDP.
    exact = {"SIMULATED_NATIVE_BFLOAT16": "0"}
    options = SMALL_RECOVERY | {"train": train, "learning_rate": 3e-3}
    arguments = ["recover", pruned, "--data", text_file, *flags(options), "--json"]
    outcome = launch(*arguments, "-o", tmp_path / "a", environment=sharded | exact)
    record = only_json(outcome)
    alone = only_json(launch(*arguments, "-o", tmp_path / "b", environment=exact))
    assert record["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-5)
    first, second = (adapruner.load(tmp_path / name) for name in ("a", "b"))
    assert first.config.architectures == second.config.architectures
    of_second = second.state_dict()
    changes = {name: float((own - of_second[name]).abs().max()) for name, own in first.state_dict().items()}
    assert {name: change for name, change in changes.items() if change > 1e-5} == {}


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

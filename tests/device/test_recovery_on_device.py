"""Recovery on a GPU: every way of training, and resuming on another device."""

import json
import shutil
from pathlib import Path

import pytest

import adapruner
from adapruner.run.recover import RecoveryFolder
from device.client import SMALL_RUN, only_json, only_line, pruning, recovering

KILLED = 9


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    path = tmp_path_factory.mktemp("instructions") / "instructions.jsonl"
    lines = [{"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i + 2} w{i + 3}"} for i in range(80)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def command(model: Path, data: object, output: Path, place: str, **options: object) -> list[object]:
    return [*recovering(model, data, output, **{"learning_rate": 3e-3} | options), "--device", place]


@pytest.mark.device_matrix
@pytest.mark.parametrize(
    ("train", "method", "dtype", "native", "kind"),
    [
        ("lora", "labels", "bfloat16", False, "instructions"),
        ("lora", "distillation", "float32", False, "mix"),
        ("full", "labels", "float16", True, "text"),
        ("full", "distillation", "float32", False, "text"),
    ],
)
def test_recover(train, method, dtype, native, kind, device, family, text_file, instructions, tmp_path):
    model = family("llama", dtype)
    data = {"text": text_file, "instructions": instructions, "mix": "mix"}[kind]
    teacher = ["--teacher", model] if method == "distillation" else []
    losses = []
    for place in ("cuda", "cpu"):
        seq_len = 96 if kind == "instructions" else 16
        arguments = command(model, data, tmp_path / place, place, train=train, seq_len=seq_len)
        outcome = device.run(*arguments, *teacher, native_bfloat16=native)
        record = only_json(outcome)
        losses.append([record["loss_before"], record["loss_after"]])
        assert outcome.left == 0
    # In narrower dtypes sums over other batches differ.
    if dtype == "float32" and not native:
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.01)
    assert str(adapruner.load(tmp_path / "cuda").dtype) == f"torch.{dtype}"


def test_recovery_on_the_cpu_leaves_the_gpu_alone(device, family, text_file, tmp_path):
    """A user may choose the CPU because the GPU is full."""
    arguments = command(family("llama"), text_file, tmp_path / "a", "cpu")
    outcome = device.run(*arguments, memory=1000)
    only_json(outcome)
    assert {stage.name: stage.peak for stage in outcome.stages if stage.peak} == {}


@pytest.mark.device_matrix
@pytest.mark.parametrize(("train", "first", "second"), [("lora", "cpu", "cuda"), ("full", "cuda", "cpu")])
def test_a_recovery_resumes_on_another_device(train, first, second, device, family, text_file, tmp_path):
    model, options = family("llama"), {"train": train, "steps": 10}
    # So that the products of full training are float32 too.
    killed = device.run(
        *command(model, text_file, tmp_path / "a", first, **options), killed_in=("recovering", 6), native_bfloat16=False
    )
    assert killed.code == KILLED
    assert list(RecoveryFolder(tmp_path / "a").unfinished.rglob("checkpoint-*"))
    resumed = device.run(*command(model, text_file, tmp_path / "a", second, **options), native_bfloat16=False)
    whole = device.run(*command(model, text_file, tmp_path / "b", second, **options), native_bfloat16=False)
    records = [only_json(outcome) for outcome in (resumed, whole)]
    assert records[0]["loss_after"] == pytest.approx(records[1]["loss_after"], rel=1e-4)
    assert records[0]["steps"] == 10


@pytest.mark.device_matrix
@pytest.mark.parametrize(("stage", "first", "second"), [("searching", "cpu", "cuda"), ("healing", "cuda", "cpu")])
def test_a_run_continues_on_its_own_kind_of_device_only(stage, first, second, device, family, text_file, tmp_path):
    """Numbers depend on the kind of device: it is named, and `--overwrite` rebuilds."""
    output = tmp_path / "a"
    arguments = pruning(family("llama"), text_file, output, SMALL_RUN | {"heal": "6k"})
    killed = device.run(*arguments, "--device", first, killed_in=(stage, 2), native_bfloat16=False)
    assert killed.code == KILLED
    shutil.copytree(output, tmp_path / "copy")
    message = only_line(device.run(*arguments, "--device", second, native_bfloat16=False))
    assert "device" in message
    assert "--overwrite" in message
    resumed = device.run(*arguments, "--device", first, native_bfloat16=False)
    rebuilt = device.run(
        *[tmp_path / "copy" if argument == output else argument for argument in arguments],
        *("--device", second, "--overwrite"),
        native_bfloat16=False,
    )
    losses = [only_json(outcome)["healing"]["loss_before"] for outcome in (resumed, rebuilt)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.device_matrix
def test_what_is_trained_diverges_in_one_line(device, family, text_file, tmp_path):
    arguments = command(family("llama"), text_file, tmp_path / "a", "cuda", train="full", steps=8, learning_rate=1e30)
    outcome = device.run(*arguments)
    assert "is nan at step" in only_line(outcome) or "is inf at step" in only_line(outcome)

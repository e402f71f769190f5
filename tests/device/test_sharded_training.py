"""FSDP2: recovery with weights that are shared out between two GPUs, as `accelerate launch --use_fsdp` starts it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import adapruner
from adapruner.model.config import load_config
from adapruner.model.loading import empty_model
from adapruner.model.places import find_model
from adapruner.options import RecoveryOptions
from device.client import SMALL_RECOVERY, only_json, only_line, pruning, recovering
from training_memory import training_memory

pytestmark = pytest.mark.device_matrix

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
# Products in bfloat16 are rounded elsewhere with FSDP.
EXACT = {"SIMULATED_NATIVE_BFLOAT16": "0"}
KILLED = 9


def recovery(model: Path, text: Path, output: Path, **options: object) -> list[object]:
    # The processes draw dropout each for itself.
    exact = {"learning_rate": 3e-3, "lora_dropout": 0}
    return recovering(model, text, output, **exact | options)


@dataclass(frozen=True)
class Killed:
    """A recovery that was killed.

    Attributes:
        folder: where the recovery `a` was to be, with what was left of it.
    """

    folder: Path
    model: Path
    text: Path
    options: dict[str, object]
    variables: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return SHARDED | EXACT | self.variables

    def command(self, output: Path) -> list[object]:
        return recovery(self.model, self.text, output, **self.options)


def check_equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    changes = {name: float((weight - theirs[name]).abs().max()) for name, weight in ours.items()}
    assert {name: change for name, change in changes.items() if change > 1e-5} == {}


@pytest.fixture(scope="module")
def pruned(two_devices, family, text_file, tmp_path_factory):
    """A model whose layers differ."""
    folder = tmp_path_factory.mktemp("pruned")
    only_json(two_devices.run(*pruning(family("llama"), text_file, folder)))
    return folder / "model"


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Text that is easy to learn: every step of a training is better than the one before."""
    path = tmp_path_factory.mktemp("texts") / "counting.txt"
    path.write_text("\n\n".join(" ".join(f"w{(start + i) % 20}" for i in range(20)) for start in range(100)))
    return path


@pytest.fixture(
    scope="module", params=[("lora", "SHARDED_STATE_DICT"), ("full", "FULL_STATE_DICT")], ids=["lora", "full"]
)
def killed(request, two_devices, family, counting, tmp_path_factory):
    """On two GPUs, in the middle of eight steps."""
    train, saved = request.param
    folder = tmp_path_factory.mktemp("killed")
    options = {"train": train, "steps": 8, "teacher": family("llama", num_hidden_layers=3)}
    own = Killed(folder, family("llama"), counting, options, {"FSDP_STATE_DICT_TYPE": saved})

    def states() -> list[Path]:
        return list(folder.rglob("checkpoint-4/trainer_state.json"))

    outcome = two_devices.launch(
        *own.command(folder / "a"), environment=own.environment, killed_when=lambda: bool(states())
    )
    assert outcome.code == -KILLED, outcome.stderr
    assert not (folder / "a").exists()
    # Only a training that resumes from here has this number in its record.
    [state] = states()
    edited = json.loads(state.read_text())
    next(entry for entry in edited["log_history"] if "eval_loss" in entry)["eval_loss"] = 123
    state.write_text(json.dumps(edited))
    return own


@pytest.fixture(scope="module")
def undisturbed(killed, two_devices):
    """The same in one process without FSDP."""
    output = killed.folder / "undisturbed"
    record = only_json(two_devices.run(*killed.command(output), native_bfloat16=False))
    # Or the weights before the kill would be kept, and resuming not be seen in them.
    assert record["best_step"] == 8
    return output


@pytest.mark.parametrize("processes", [2, 1])
def test_a_killed_recovery_resumes(processes, killed, undisturbed, launch, tmp_path):
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    outcome = launch(*killed.command(tmp_path / "a"), environment=killed.environment, processes=processes)
    record = only_json(outcome)
    assert (record["steps"], record["loss_before"]) == (8, 123)
    # By transformers alone.
    check_equal_weights(*(AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "a", undisturbed)))


def test_a_killed_recovery_does_not_resume_without_fsdp(killed, two_devices, tmp_path):
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    assert "resumes only with FSDP" in only_line(two_devices.run(*killed.command(tmp_path / "a")))


def test_a_recovery_without_fsdp_does_not_resume_with_it(launch, two_devices, family, text_file, tmp_path):
    arguments = recovery(family("llama"), text_file, tmp_path / "a", steps=12)
    assert two_devices.run(*arguments, killed_in=("recovering", 6)).code == KILLED
    refused = launch(*arguments, environment=SHARDED, processes=1)
    assert refused.code != 0
    assert "resumes only without FSDP" in refused.stderr


def test_a_process_that_fails_ends_all(launch, family, text_file, tmp_path):
    """The other one waits for it."""
    arguments = recovery(family("llama"), text_file, tmp_path / "a", train="full")
    poor = {"SIMULATED_POOR_RANK": "1", "SIMULATED_POOR_BYTES": "600000"}
    outcome = launch(*arguments, environment=SHARDED | poor)
    assert outcome.code != 0
    # The launcher ends the other one, which may still say so, or that gloo lost the connection; NCCL would wait.
    said = [line for line in outcome.stderr.splitlines() if line.startswith("adapruner: ")]
    assert len([line for line in said if "out of memory" in line]) == 1, said
    assert not outcome.stdout
    assert not (tmp_path / "a").exists()


def test_a_model_whose_layers_differ_is_saved_whole(launch, pruned, text_file, tmp_path):
    """Against data parallel training."""
    arguments = recovery(pruned, text_file, tmp_path / "a", train="full")
    record = only_json(launch(*arguments, environment=SHARDED | EXACT))
    alone = only_json(launch(*recovery(pruned, text_file, tmp_path / "b", train="full"), environment=EXACT))
    assert record["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-5)
    first, second = (adapruner.load(tmp_path / name) for name in ("a", "b"))
    assert first.config.architectures == second.config.architectures
    check_equal_weights(first, second)


@pytest.mark.parametrize(("train", "processes"), [("full", 4), ("lora", 2)])
def test_student_and_teacher_are_shared_out(train, processes, launch, family, counting, tmp_path):
    """Neither is ever whole on a device, and the loss is that of one device."""
    student, teacher = (family("llama", num_hidden_layers=layers) for layers in (24, 32))
    models = [empty_model(load_config(find_model(str(folder)))) for folder in (student, teacher)]
    options = {"train": train, "batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True}
    losses, peaks, estimates = [], [], []
    for count, environment in ((processes, SHARDED | EXACT), (1, EXACT)):
        arguments = recovery(student, counting, tmp_path / str(count), teacher=teacher, **options)
        outcome = launch(*arguments, environment=environment, processes=count)
        losses.append(only_json(outcome)["loss_after"])
        held = [int(held) for held in re.findall(r"rank \d held (\d+) bytes", outcome.stderr)]
        assert len(held) == count
        peaks.append(max(held))
        terms = training_memory(*models, RecoveryOptions(**SMALL_RECOVERY | options), torch.float32, count)
        estimates.append(sum(terms.values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert peaks == pytest.approx(estimates, rel=0.1)


def test_a_sharded_teacher_writes_what_it_predicts(launch, two_devices, family, counting, tmp_path):
    """Of all tokens, so that the loss is the full one."""
    teacher = family("llama", num_hidden_layers=3)
    arguments = recovery(
        family("llama"), counting, tmp_path / "a", teacher=teacher, teacher_top=256, micro_batch_size=1
    )
    stored = only_json(launch(*arguments, environment=SHARDED | EXACT))
    arguments = recovery(family("llama"), counting, tmp_path / "b", teacher=teacher, micro_batch_size=1)
    alone = only_json(two_devices.run(*arguments, native_bfloat16=False))
    assert stored["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-4)

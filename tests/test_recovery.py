"""Training again: what is learnt, that it helps, that it goes on after a kill, and what is refused before it begins."""

import copy
import json
import math
import random
import re
import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.pytorch_utils import Conv1D

import adapruner
from adapruner import AdaPrunerError, PruneConfig, RecoveryOptions, families
from adapruner.base.processes import Process
from adapruner.checkpoint import save_checkpoint
from adapruner.formats.gguf import write_gguf
from adapruner.model.loading import in_fastest_dtype
from adapruner.report.card import card_of_recovered
from adapruner.run.recover import RecoveryFolder, read_record
from adapruner.text.blends import BlendPart, parse_blend
from adapruner.train.examples import Example, Examples, instruction_examples, read_examples, window_examples
from adapruner.train.trainer import check_device, check_processes, check_trainer_options
from adapruner.train.training import RecoveryRecord, train
from conftest import tiny_model
from run_helpers import RIVER, byte_tokenizer, exit_code, run_killed
from tiny_families import tiny_config

SHORT = {"seq_len": 16, "batch_size": 4, "micro_batch_size": 2, "steps": 10, "learning_rate": 3e-3}


@pytest.fixture
def examples():
    """Windows that count upwards, which is easy to learn."""
    starts = torch.randint(4, 60, (40, 1), generator=torch.Generator().manual_seed(3))
    return window_examples(starts + torch.arange(16), BlendPart("text", 1.0, None), RecoveryOptions(**SHORT))


@pytest.fixture
def recover(model_folder, text_file):
    """A model is fine-tuned on a text, into the given folder."""
    return partial(adapruner.recover, model_folder, str(text_file))


def train_in_place(model: PreTrainedModel, examples: Examples, *arguments: Any, **named: Any) -> RecoveryRecord:
    return train(lambda: model, [examples], *arguments, **named)[1]


def held_out_loss(model: PreTrainedModel, examples: Examples) -> float:
    """By the loss of transformers."""
    rows = torch.tensor([example["input_ids"] for example in examples.validation])
    with torch.no_grad():
        return float(model(rows, labels=rows).loss)


def test_of_instructions_the_answer_alone_is_learnt(tokenizer):
    records = [
        {"instruction": "w1 w2", "input": "w3", "output": "w4 w5"},
        {"instruction": "w6", "input": "", "output": "w7"},
    ]
    made = instruction_examples(records, BlendPart("data", 1.0, None), tokenizer, RecoveryOptions(seq_len=256))
    by_answer = {}
    for example in made.training + made.validation:
        learnt = [token for token in example["labels"] if token != -100]
        assert example["input_ids"][-len(learnt) :] == learnt
        by_answer[tokenizer.decode(learnt)] = tokenizer.decode(example["input_ids"][: -len(learnt)])
    assert set(by_answer) == {"w4 w5 </s>", "w7 </s>"}
    with_input = by_answer["w4 w5 </s>"]
    assert "w1 w2" in with_input
    assert "w3" in with_input
    assert "w3" not in by_answer["w7 </s>"]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    records: list[dict[str, str | None]] = [{"instruction": f"w{number}", "output": "w3 w4"} for number in range(5)]
    made = instruction_examples(records, BlendPart("data", 1.0, None), ending, RecoveryOptions(seq_len=256))
    for example in [*made.training, *made.validation]:
        assert example["input_ids"][0] == ending.bos_token_id
        assert example["input_ids"].count(ending.eos_token_id) == 1
        assert [label for label in example["labels"] if label >= 0] == ending("w3 w4").input_ids[1:]


def test_long_instructions_are_cut_off_and_empty_answers_skipped(tokenizer):
    record = {"instruction": "w1", "input": "", "output": "w2 " * 300}
    records = [record] * 3 + [record | {"output": ""}, record | {"instruction": "w1 " * 300}]
    made = instruction_examples(records, BlendPart("data", 1.0, None), tokenizer, RecoveryOptions(seq_len=128))
    assert (len(made.training), len(made.validation), made.skipped) == (2, 1, 2)
    assert {len(example["input_ids"]) for example in made.training} == {128}


def test_validation_windows_are_not_trained_on(examples):
    assert (len(examples.training), len(examples.validation)) == (36, 4)
    fewer = window_examples(
        torch.arange(40)[:, None] + torch.arange(16), BlendPart("text", 1.0, None), RecoveryOptions(records=20)
    )
    starts = [example["input_ids"][0] for example in fewer.training + fewer.validation]
    assert starts == list(range(0, 40, 2))
    more = window_examples(
        torch.arange(40)[:, None] + torch.arange(16), BlendPart("text", 1.0, None), RecoveryOptions(records=90)
    )
    assert [example["input_ids"][0] for example in more.training + more.validation] == list(range(40))


def test_lora_lowers_the_loss_and_leaves_an_ordinary_model(model, examples, tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = RecoveryOptions(**SHORT, lora_rank=2)
    steps: list[int] = []
    recovered = train_in_place(model, examples, options, tmp_path / "work", progress=steps.append)
    assert recovered.loss_after < recovered.loss_before
    assert (sum(steps), recovered.steps, recovered.tokens) == (10, 10, 10 * 4 * 16)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    layers = model.base_model.layers
    linear = {f"model.layers.{name}.weight" for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    changes = {name: after[name].detach() - before[name] for name in before}
    assert {name for name, change in changes.items() if change.any()} == linear
    assert max(int(torch.linalg.matrix_rank(changes[name], rtol=1e-3)) for name in linear) == 2
    assert math.isclose(held_out_loss(model, examples), recovered.loss_after, rel_tol=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ia3_scales_the_inputs_of_every_linear_layer(make_model, examples, tmp_path, family):
    """GPT-2 stores its projections transposed."""
    model = make_model(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = RecoveryOptions(**SHORT | {"learning_rate": 0.03}, train="ia3")
    recovered = train_in_place(model, examples, options, tmp_path / "work")
    assert recovered.loss_after < recovered.loss_before
    transposed = family == "gpt2"
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)} - {"lm_head"}
    for name, weight in model.named_parameters():
        assert weight.equal(before[name]) != (name.removesuffix(".weight") in linear)
    for name in linear:
        ratios = (model.get_submodule(name).weight / before[f"{name}.weight"]).detach()
        per_input = ratios if transposed else ratios.T
        torch.testing.assert_close(per_input, per_input[:, :1].expand_as(per_input))
        assert len(per_input[:, 0].unique()) > 1
    assert math.isclose(held_out_loss(model, examples), recovered.loss_after, rel_tol=0.02)


@pytest.mark.parametrize("trained", ["lora", "ia3", "full"])
def test_computing_activations_twice_changes_no_weight(trained, model, examples, tmp_path):
    """Layers are run again on the way back: twice as often in a step, and nothing else differs."""
    weights, calls = [], []
    for twice in (False, True):
        copied, seen = copy.deepcopy(model), list[nn.Module]()
        copied.model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda module, _, seen=seen: seen.append(module)
        )
        options = RecoveryOptions(**SHORT | {"gradient_checkpointing": twice, "train": trained, "lora_dropout": 0.0})
        train_in_place(copied, examples, options, tmp_path / str(twice))
        weights.append(copied.state_dict())
        calls.append(len(seen))
    assert calls[1] > 1.3 * calls[0]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_several_gpus_are_left_alone_by_one_process(make_model, examples, tmp_path, monkeypatch):
    """The Trainer would give each of them a batch of the size that was asked for."""

    own = vars(TrainingArguments)["_setup_devices"]

    def of_a_machine_with_two(arguments: TrainingArguments) -> torch.device:
        device: torch.device = own.__get__(arguments, TrainingArguments)
        arguments._n_gpu = 2
        return device

    trained = []
    for place in ("one", "two"):
        trained.append(make_model("llama"))
        train_in_place(trained[-1], examples, RecoveryOptions(**SHORT), tmp_path / place)
        found = cached_property(of_a_machine_with_two)
        found.__set_name__(TrainingArguments, "_setup_devices")
        monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(one, other)


def launched(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Makes this process one of two that `torchrun` started."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "a"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_training_goes_to_the_first_gpu_alone(monkeypatch):
    for device in ("cpu", "cuda", "cuda:0"):
        check_device(torch.device(device))
    with pytest.raises(AdaPrunerError, match="CUDA_VISIBLE_DEVICES=1"):
        check_device(torch.device("cuda:1"))
    launched(monkeypatch, 0)
    check_device(torch.device("cuda:1"))


@pytest.mark.parametrize("train_what", ["lora", "ia3", "full"])
def test_distillation_brings_a_model_nearer_to_its_teacher(make_model, examples, tmp_path, train_what):
    teacher, student = make_model(), make_model()
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(0.2)
    rows = torch.tensor([example["input_ids"] for example in examples.validation])

    def divergence() -> float:
        with torch.no_grad():
            predicted, wanted = (one(rows).logits[:, :-1].log_softmax(-1) for one in (student, teacher))
            return float((wanted.exp() * (wanted - predicted)).sum(-1).mean())

    before = divergence()
    options = RecoveryOptions(**SHORT | {"steps": 30}, train=train_what, lora_dropout=0.0)
    for example in [*examples.training, *examples.validation]:
        example["label_weight"] = 0.0
    recovered = train_in_place(student, examples, options, tmp_path / "work", in_fastest_dtype(teacher))
    assert math.isclose(recovered.loss_before, before, rel_tol=0.02)
    assert math.isclose(recovered.loss_after, divergence(), rel_tol=0.02)
    assert divergence() < 0.8 * before


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt2", torch.float32), ("gpt_neox", torch.float32), ("phi3", torch.float32), ("llama", torch.float16)],
)
def test_families_with_other_projections_and_half_precision(make_model, examples, tmp_path, family, dtype):
    """Which is never trained in."""
    model = make_model(family).to(dtype)
    recovered = train_in_place(model, examples, RecoveryOptions(**SHORT), tmp_path / "work")
    assert recovered.loss_after < recovered.loss_before
    assert model.dtype == dtype
    assert math.isclose(held_out_loss(model.float(), examples), recovered.loss_after, rel_tol=0.02)


@pytest.mark.parametrize("train_what", ["lora", "ia3", "full"])
def test_of_mixtures_routers_keep_their_dtype_and_every_linear_layer_learns(make_model, examples, tmp_path, train_what):
    vocabulary = make_model().config.vocab_size
    config = tiny_config("deepseek_v3", vocab_size=vocabulary)
    families.resolve(config)
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    routers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for buffer in routers.values():
        buffer.data = torch.linspace(8, 8.03, len(buffer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = RecoveryOptions(**SHORT | {"steps": 6}, train=train_what)
    train_in_place(model, examples, options, tmp_path / "work")
    linear = {f"{name}.weight" for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    assert routers
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        if name.removeprefix("model.layers.") in linear or name in routers:
            assert tensor.equal(before[name]) == (name in routers), name


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(model, examples, tmp_path, monkeypatch):
    calls = 0
    original = Trainer.training_step

    def breaks(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments, **named) * (math.nan if calls > 7 else 1)

    monkeypatch.setattr(Trainer, "training_step", breaks)
    with pytest.raises(
        AdaPrunerError, match=r"the loss is nan at step 4; the last checkpoint, .*checkpoint-2, is kept"
    ):
        train_in_place(model, examples, RecoveryOptions(**SHORT), tmp_path / "work")
    assert (tmp_path / "work" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "work" / "checkpoint-4").exists()


def test_weights_that_explode_stop_the_training(model, examples, tmp_path):
    with pytest.raises(AdaPrunerError, match=r"is (nan|inf) at step \d+; .*Lower `learning_rate` \(1e\+30\)"):
        train_in_place(
            model, examples, RecoveryOptions(**SHORT | {"learning_rate": 1e30, "steps": 20}), tmp_path / "work"
        )


def test_a_batch_is_made_of_whole_micro_batches(model, examples, tmp_path):
    options = RecoveryOptions(**SHORT | {"batch_size": 6, "micro_batch_size": 4, "steps": None, "epochs": 1})
    recovered = train_in_place(model, examples, options, tmp_path / "work")
    assert (recovered.steps, recovered.tokens) == (6, 36 * 16)
    state = json.loads((tmp_path / "work" / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["train_batch_size"], state["epoch"]) == (3, 1.0)


def test_the_optimizer_is_one_of_the_trainer(model, examples, tmp_path):
    check_trainer_options(RecoveryOptions(optimizer="sgd"))
    train_in_place(model, examples, RecoveryOptions(**SHORT | {"optimizer": "adafactor"}), tmp_path / "work")
    last = max((tmp_path / "work").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    states = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert any("exp_avg_sq_row" in state for state in states.values())
    for name, message in {"adam": "not a valid OptimizerNames", "apollo_adamw": "install `apollo_torch`"}.items():
        with pytest.raises(AdaPrunerError, match=f"`optimizer` {name}: .*{message}"):
            check_trainer_options(RecoveryOptions(optimizer=name))


class Curves(TrainerCallback):
    """Takes the place of an experiment tracker."""

    logged: list[dict[str, float]] = []  # noqa: RUF012  # the Trainer makes the object

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.logged.append(dict(logs or {}))


def test_the_curves_go_to_the_named_tracker(model, examples, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Curves)
    monkeypatch.setattr(Curves, "logged", [])
    train_in_place(model, examples, RecoveryOptions(**SHORT), tmp_path / "untold")
    assert not Curves.logged

    options = RecoveryOptions(**SHORT | {"report_to": "tensorboard"})
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with pytest.raises(AdaPrunerError, match="`report_to` tensorboard: set the environment variable"):
        check_trainer_options(options)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    check_trainer_options(options)
    record = train_in_place(model, examples, options, tmp_path / "told")
    assert Curves.logged[0]["eval_loss"] == record.loss_before
    assert sum("loss" in logs for logs in Curves.logged) == record.steps


@pytest.mark.parametrize(
    ("name", "message"), [("minicomputer", "not supported, only azure_ml"), ("comet_ml", "requires comet-ml")]
)
def test_a_tracker_that_cannot_be_used_is_refused(name, message):
    with pytest.raises(AdaPrunerError, match=f"`report_to` {name}: .*{message}"):
        check_trainer_options(RecoveryOptions(report_to=name))


@pytest.mark.parametrize(("length", "steps", "seen"), [({"epochs": 1}, 5, 36), ({}, 9, 2 * 36), ({"steps": 7}, 7, 56)])
def test_the_last_batch_is_what_is_left(model, examples, tmp_path, length, steps, seen):
    """36 windows are four batches of 8 and half of one; by default, there are two passes."""
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: tokens.append(inputs[0].numel() if module.training else 0)
    )
    options = RecoveryOptions(**SHORT | {"batch_size": 8, "steps": None} | length)
    recovered = train_in_place(model, examples, options, tmp_path / "work")
    assert recovered.steps == steps
    assert recovered.tokens == sum(tokens) == seen * 16
    assert recovered.parts["text"].passes == round(seen / 36, 3)


def test_a_call_that_was_killed_after_the_last_step(make_model, examples, tmp_path):
    """As while it saves: there is nothing left to learn, and the outcome is the same."""
    work, options = tmp_path / "work", RecoveryOptions(**SHORT)
    first, second = make_model(), make_model()
    one = train_in_place(first, examples, options, work)
    steps: list[int] = []
    other = train_in_place(second, examples, options, work, progress=steps.append)
    assert (other.steps, other.tokens, other.best_step) == (one.steps, one.tokens, one.best_step)
    assert sum(steps) == 10
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_best_weights_are_found_where_the_folder_was_moved(make_model, examples, tmp_path):
    work, options = tmp_path / "work", RecoveryOptions(**SHORT | {"learning_rate": 0.2})
    first, second = make_model(), make_model()
    assert train_in_place(first, examples, options, work).best_step < 10
    train_in_place(second, examples, options, work.rename(tmp_path / "moved"))
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_one_command_at_a_time_trains_into_a_folder(recover, tmp_path):
    begun: list[str] = []

    def second(*given: object) -> None:
        with pytest.raises(AdaPrunerError, match=r"another command is running in .*out") as refusal:
            recover(tmp_path / "out", **SHORT)
        begun.append(str(refusal.value))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapruner.run.recover.train", second)
        with pytest.raises(KeyboardInterrupt):
            recover(tmp_path / "out", **SHORT)
    assert len(begun) == 1
    assert recover(tmp_path / "out", **SHORT).steps == SHORT["steps"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.adapruner", "out"]


def test_the_first_process_alone_prints(recovered, model_folder, text_file, monkeypatch, capsys):
    record = read_record(recovered)
    monkeypatch.setattr("adapruner.run.recover.recover", lambda *_, **__: record)
    command = ["recover", str(model_folder), "--data", str(text_file), "-o", str(recovered), "--json"]
    for rank in (0, 1):
        launched(monkeypatch, rank)
        assert exit_code(command) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_training_leaves_the_random_state_of_the_host(model, examples, tmp_path):
    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    train_in_place(model, examples, RecoveryOptions(**SHORT), tmp_path / "work")
    assert state() == before


def test_the_same_command_goes_on_after_a_kill(model_folder, text_file, tmp_path):
    def command(output: Path) -> list[str]:
        options = ["--seq-len", "16", "--batch-size", "4", "--micro-batch-size", "2", "--steps", "20"]
        return ["recover", str(model_folder), "--data", str(text_file), "-o", str(output), *options]

    exit_code(command(tmp_path / "undisturbed"))
    killed = tmp_path / "killed"
    # Two calls of the training step are a step of the optimizer; every fourth step is saved.
    for calls, saved in [(15, 4), (9, 8)]:
        run_killed("transformers.Trainer", "training_step", calls, command(killed), tmp_path)
        assert not killed.exists()
        [training] = RecoveryFolder(killed).unfinished.glob("model-*/training")
        assert (training / f"checkpoint-{saved}").is_dir()
    # What a kill in the middle of saving leaves.
    broken = training / "checkpoint-12"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    exit_code(command(killed))
    first, second = (adapruner.load(tmp_path / name) for name in ("undisturbed", "killed"))
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    one, other = (json.loads((tmp_path / name / "recovery.json").read_text()) for name in ("undisturbed", "killed"))
    for field in ("steps", "tokens", "best_step", "loss_before"):
        assert one[field] == other[field]
    assert not RecoveryFolder(killed).unfinished.exists()


@pytest.fixture(scope="module")
def recovered(tmp_path_factory, model_folder, text_file):
    folder = tmp_path_factory.mktemp("recovered") / "a"
    adapruner.recover(model_folder, str(text_file), folder, **SHORT)
    return folder


def test_a_finished_recovery_is_not_done_again(recover, recovered, monkeypatch):
    monkeypatch.setattr("adapruner.run.recover.open_model", lambda *_: pytest.fail("loaded"))
    record = recover(recovered, **SHORT)
    assert record.model_dump(mode="json") == json.loads((recovered / "recovery.json").read_text())
    assert record.method == "labels"
    with pytest.raises(AdaPrunerError, match="another configuration \\(steps 10 → 11\\)"):
        recover(recovered, **SHORT | {"steps": 11})


def test_another_model_of_the_same_name_is_not_taken_for_the_first(model_folder, text_file, tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(model_folder, model)
    shutil.copy(text_file, text)
    adapruner.recover(model, str(text), tmp_path / "a", **SHORT | {"steps": 2})
    tensors = load_file(model / "model.safetensors")
    changed = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdaPrunerError, match="another config"):
        adapruner.recover(model, str(text), tmp_path / "a", **SHORT | {"steps": 2})
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    adapruner.recover(model, str(text), tmp_path / "a", **SHORT | {"steps": 2})
    text.write_text(text.read_text() + "\n\nw1 w2 w3")
    with pytest.raises(AdaPrunerError, match="another config"):
        adapruner.recover(model, str(text), tmp_path / "a", **SHORT | {"steps": 2})


def test_overwriting_starts_again(model_folder, text_file, tmp_path):
    folder = tmp_path / "a"
    adapruner.recover(model_folder, str(text_file), folder, **SHORT)
    record = adapruner.recover(model_folder, str(text_file), folder, overwrite=True, **SHORT | {"steps": 3})
    assert record.steps == 3
    record = adapruner.recover(
        model_folder, str(text_file), folder, overwrite=True, dtype="bfloat16", **SHORT | {"steps": 3}
    )
    assert adapruner.load(folder).dtype == torch.bfloat16
    with pytest.raises(AdaPrunerError, match="is or contains"):
        adapruner.recover(folder, str(text_file), folder, overwrite=True, **SHORT)
    assert adapruner.load(folder).dtype == torch.bfloat16


def test_what_is_finished_stays_until_something_takes_its_place(recover, tmp_path, monkeypatch):
    folder, options = tmp_path / "a", SHORT | {"steps": 2}
    recover(folder, **options)
    before = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("adapruner.run.recover.open_model", lambda *_, **__: pytest.fail("no memory"))
        with pytest.raises(pytest.fail.Exception):
            recover(folder, overwrite=True, **options | {"steps": 3})
    assert (folder / "model.safetensors").read_bytes() == before
    assert recover(folder, **options).steps == 2
    with pytest.raises(AdaPrunerError, match="steps 2 → 3"):
        recover(folder, **options | {"steps": 3})
    assert recover(folder, overwrite=True, **options | {"steps": 3}).steps == 3
    (folder / "model.safetensors").unlink()
    assert recover(folder, **options | {"steps": 3}).steps == 3
    assert (folder / "model.safetensors").is_file()


def test_a_folder_around_what_is_read_is_refused(model_folder, text_file, tmp_path):
    (tmp_path / "texts").mkdir()
    text = shutil.copy(text_file, tmp_path / "texts" / "text.txt")
    for around in (model_folder.parent, tmp_path / "texts"):
        with pytest.raises(AdaPrunerError, match="is or contains"):
            adapruner.recover(model_folder, str(text), around, overwrite=True, **SHORT)


@pytest.mark.parametrize("distils", [False, True])
def test_the_validation_loss_is_the_mean_over_tokens(distils, model, tmp_path):
    """Of answers of different lengths, however many are in a batch."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(12):
        tokens = torch.randint(4, 60, (6 + number,), generator=generator).tolist()
        made.append(Example(input_ids=tokens, labels=[-100] * 3 + tokens[3:], label_weight=0.5 if distils else 1.0))
    examples = Examples("answers", made[:6], made[6:])
    losses = []
    for row in examples.validation:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted = torch.tensor(row["labels"][1:])
        losses.append(nn.functional.cross_entropy(logits[wanted != -100], wanted[wanted != -100], reduction="none"))
    for micro in (1, 4):
        options = RecoveryOptions(**SHORT | {"steps": 1, "micro_batch_size": micro})
        # The divergence from itself is 0.
        expected = float(torch.cat(losses).mean()) * (options.label_weight if distils else 1.0)
        student, teacher = copy.deepcopy(model), in_fastest_dtype(model) if distils else None
        record = train_in_place(student, examples, options, tmp_path / str(micro), teacher)
        assert record.loss_before == pytest.approx(expected, rel=2e-3)


def test_the_teacher_writes_the_text_itself(model_folder, tmp_path):
    record = adapruner.recover(
        model_folder, "mix", tmp_path / "a", teacher=str(model_folder), **SHORT | {"steps": 7, "records": 3}
    )
    # Seven steps of four examples, four of each kind; and one of each for validation.
    assert (record.method, record.training_examples, record.validation_examples) == ("distillation", 14, 7)
    assert {part.learnt for part in record.parts.values()} == {4}
    assert record.loss_before < 1e-3


def test_the_recipe_of_the_paper_trains_what_llm_pruner_trains(model_folder, tmp_path, capsys):
    """In a run, it comes before what the run was made from; arguments come before the recipe."""
    run, data = tmp_path / "run", tmp_path / "alpaca.jsonl"
    shutil.copytree(model_folder, run / "model")
    PruneConfig.from_options(model=str(model_folder), calibration="mix").save(run / "config.yaml")
    data.write_text("".join(f'{{"instruction": "w{n}", "input": "", "output": "w{n + 1}"}}\n' for n in range(40)))
    assert exit_code(["recover", str(run), "--recipe", "paper", "--data", str(data), "--seed", "3", "--json"]) == 0
    record = read_record(run / "recovered")
    assert record.method == "labels"
    assert (record.steps, record.training_examples + record.validation_examples) == (2, 40)
    wanted = {"train": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 1e-4}
    wanted |= {"warmup_steps": 100, "batch_size": 64, "epochs": 2, "seq_len": 256, "seed": 3}
    assert record.config.items() >= wanted.items()
    shorter = adapruner.recover(run, str(data), tmp_path / "short", recipe="paper", steps=1)
    assert (shorter.steps, shorter.config["epochs"]) == (1, None)
    capsys.readouterr()
    assert exit_code(["recover", str(run), "--recipe", "paper-20"]) == 2
    assert "--ratio is not an option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "w1", "input": ""}\n' * 3, "instructions with answers have the columns instruction, output"),
        ('{"instruction": "w1", "output": "w2"}\n{"instruction": "w1"}\n', "record 2 of .* has no output"),
        ('{"instruction": " ", "output": "w2"}\n' * 2, "record 1 of .* has no instruction"),
        ('{"instruction": "w1", "output": "w2"}\n', "gives 1 examples .* 2 are needed"),
    ],
)
def test_malformed_data_are_refused_before_the_model_is_loaded(
    model_folder, tmp_path, content, message, capsys, monkeypatch
):
    monkeypatch.setattr("adapruner.run.recover.open_model", lambda *_: pytest.fail("loaded"))
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    output = tmp_path / "out"
    assert exit_code(["recover", str(model_folder), "--data", str(path), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not output.exists()
    assert not RecoveryFolder(output).unfinished.parent.exists()


def test_a_folder_of_something_else_is_left_alone(recover, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdaPrunerError, match="holds no such recovery"):
        recover(tmp_path, overwrite=True, **SHORT)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_took_the_place_of_a_recovery_is_left_alone(recover, tmp_path):
    output = tmp_path / "recovered"
    recover(output, **SHORT)
    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(AdaPrunerError, match="holds no such recovery"):
        recover(output, **SHORT)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    recover(output, **SHORT)
    assert (output / "model.safetensors").is_file()


RECORD = RecoveryRecord(
    config={"train": "full", "data": "mix,/home/me/mine.txt:0.5,hf:/home/me/hers"},
    method="labels",
    training_examples=9,
    validation_examples=1,
    skipped_records=0,
    steps=10,
    tokens=640,
    loss_before=2.0,
    loss_after=1.0,
    best_step=10,
    seconds=1.0,
)


def test_the_card_of_a_pruned_model_says_that_it_was_trained():
    pruned = (
        "---\nlicense: other\nmodel-index:\n- name: a\n  results:\n  - task:\n      type: b\n---\n\n# a\n\nIt was not"
        " fine-tuned.\n\n## What it cost\n\n| a | b |\n\n## Licence\n\nx\n"
    )
    card = card_of_recovered(pruned, RECORD)
    assert card is not None
    assert ModelCard(card).data.to_dict() == {"license": "other"}
    assert "10 steps, 640 tokens, all weights, learning the text itself" in card
    assert "`mix,mine.txt:0.5,hf:hers`" in card
    assert "| a | b |" not in card
    assert card.endswith("## Licence\n\nx\n")
    assert card_of_recovered("# another card", RECORD) is None
    healed = "It was trained to predict as the dense model does, on 5 tokens of `a: b.`, `c`: LoRA, merged."
    both = card_of_recovered(pruned.replace("It was not fine-tuned.", healed), RECORD)
    assert both is not None
    assert f"{healed} It was fine-tuned on" in both
    for first in (both, card):
        again = card_of_recovered(first, RECORD.model_copy(update={"steps": 20}))
        assert again is not None
        assert re.search(r"10 steps.* the text itself\. It was fine-tuned .* 20 steps", again)


@pytest.mark.parametrize(
    ("fields", "are_instructions"), [(("instruction", "output"), True), (("text",), False), (("output",), False)]
)
def test_text_and_instructions_are_told_apart(fields, are_instructions, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(dict.fromkeys(fields, f"w{i} w3")) + "\n" for i in range(200)))
    [made] = read_examples(parse_blend(str(path)), tokenizer, RecoveryOptions(seq_len=128), False)
    assert isinstance(made, Examples)
    assert made.name == str(path)
    # A prompt is not learnt.
    assert (made.training[0]["labels"][1] == -100) == are_instructions


def test_processes_that_cannot_train_together_are_refused(monkeypatch):
    monkeypatch.setattr("adapruner.train.trainer.this_process", lambda: Process(count=2))
    check_processes(RecoveryOptions(batch_size=4))
    with pytest.raises(AdaPrunerError, match="`batch_size` 5 cannot be divided among 2 processes"):
        check_processes(RecoveryOptions(batch_size=5))


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{number}" for number in range(92)]


def with_words(folder: Path, words: list[str], added: tuple[str, ...] = (), rows: int = 96) -> Path:
    """A tiny model whose tokens are these words, followed by added ones, in an embedding of at least as many rows."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[3]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), words, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens([*added], special_tokens=True)
    save_checkpoint(tiny_model(vocab_size=rows), tokenizer, folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"teacher_top": 8}])
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        # As of Llama 2 and Mistral, 32,000 each: the wrong ones would be learnt.
        ([*SPECIAL, "w1", "w0", *WORDS[2:]], "2 of 92 tokens differ .* 4: 'w1', not 'w0'"),
        ([*SPECIAL, *(f"x{number}" for number in range(92))], "92 of 92 tokens differ .* 4: 'x0', not 'w0'"),
        ([f"x{number}" for number in range(96)], "92 of 92 tokens differ .* 4: 'x4', not 'w0'"),
        ([*SPECIAL, *WORDS[:50], "other"], "1 of 51 tokens differ .* 54: 'other', not 'w50'"),
        ([*SPECIAL], "92 of 96 tokens differ .* 4: None, not 'w0'"),
    ],
)
def test_a_teacher_whose_tokens_are_other_words_is_refused(
    words, problem, options, recover, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("adapruner.run.recover.read_examples", None)  # which may read much text
    teacher = with_words(tmp_path / "teacher", words)
    with pytest.raises(AdaPrunerError, match=f"^`teacher`: {problem}; choose a model with the same tokenizer$"):
        recover(tmp_path / "recovered", teacher=str(teacher), **SHORT, **options)
    assert not (tmp_path / "recovered").exists()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (([*SPECIAL, *WORDS], ()), ([*SPECIAL, *WORDS], ())),
        (([*SPECIAL, *WORDS[:60]], ()), ([*SPECIAL, *WORDS[:60]], ("<user>", "<answer>"))),
        (([*SPECIAL, *WORDS[:60]], ("<user>", "<answer>")), ([*SPECIAL, *WORDS[:60]], ())),
        (([*SPECIAL, *WORDS[:60]], ("<user>", "<answer>")), ([*SPECIAL, *WORDS[:60]], ("<tool>",))),
        (([*SPECIAL, *WORDS[:60]], ("<user>",)), ([*SPECIAL, *WORDS], ())),
        (([*SPECIAL, *WORDS], ()), (["<none>", *SPECIAL[1:], *WORDS], ())),
    ],
)
def test_teachers_may_have_other_added_tokens_and_padded_embeddings(student, teacher, text_file, tmp_path):
    pair = [with_words(tmp_path / str(number), *tokens, 100) for number, tokens in enumerate((student, teacher))]
    options = SHORT | {"steps": 1, "teacher": str(pair[1])}
    record = adapruner.recover(pair[0], str(text_file), tmp_path / "recovered", **options)
    assert record.steps == 1


def test_a_gguf_file_teaches_the_model_that_it_was_made_of(make_model, text_file, tmp_path):
    tokenizer, other = byte_tokenizer(), byte_tokenizer([" ".join(sorted(RIVER[0], reverse=True)), *RIVER[:2]])
    model = make_model("llama", vocab_size=len(tokenizer) + 5, attention_bias=False, mlp_bias=False)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    write_gguf(model, tokenizer, tmp_path / "teacher.gguf", "f32")
    write_gguf(model, other, tmp_path / "other.gguf", "f32")
    recover = partial(adapruner.recover, tmp_path / "model", str(text_file), **SHORT | {"steps": 1})
    assert recover(tmp_path / "recovered", teacher=str(tmp_path / "teacher.gguf")).steps == 1
    with pytest.raises(AdaPrunerError, match=r"`teacher`: \d+ of \d+ tokens differ"):
        recover(tmp_path / "b", teacher=str(tmp_path / "other.gguf"))

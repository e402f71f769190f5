"""A run as artifacts: what is loaded, what is rebuilt, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapruner.job import Preparation
from adapruner.procedure import ARTIFACTS
from safetensors.torch import load_file, save_file

import adapruner
from adapruner import AdaPrunerError
from adapruner.files import replace
from adapruner.graph import RunFolder
from adapruner.graph.records import Record, are_as_written, stamps
from adapruner.models import known_architectures, using_architecture
from adapruner.processes import Process, this_process
from adapruner.progress import Reporter
from adapruner.run.api import prune_ratios
from run_helpers import QUICK
from run_helpers import RUN_OPTIONS as OPTIONS


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(text_file: Path, tmp_path: Path) -> Path:
    shutil.copy(text_file, tmp_path / "text.txt")
    return tmp_path / "text.txt"


@pytest.fixture
def run(finished: adapruner.PruneResult, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return tmp_path / "run"


def written(folder: Path) -> dict[str, int]:
    """When each file was written, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock"))
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def interrupt_behind(name: str, model: Path, output: Path, **options: Any) -> None:
    """Runs until an artifact is made."""
    finish = RunFolder.finish

    def then_stop(self: RunFolder, artifact: str, record: Record, *beside: Any) -> None:
        finish(self, artifact, record, *beside)
        if artifact == name:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish", then_stop)
        with pytest.raises(KeyboardInterrupt):
            adapruner.prune(str(model), output=output, **options)


def test_a_changed_option_rebuilds_what_depends_on_it_and_nothing_else(
    run: Path, model_folder: Path, text_file: Path
) -> None:
    before = written(run)
    options = OPTIONS | {"calibration": str(text_file), "trials": 11}
    with pytest.raises(
        AdaPrunerError, match=r"\(trials 9 → 11\): search.json, levelled.json, plan.json, .*report.html would"
    ):
        adapruner.prune(str(model_folder), output=run, **options)
    assert written(run) == before
    result = adapruner.prune(str(model_folder), output=run, overwrite=True, **options)
    assert result.result.search.trials == 11
    after = written(run)
    kept_alike = ("windows", "self", "moments", "statistics", "evaluation/perplexity-d", "evaluation/breakage-d")
    kept = {name for name in before if name.startswith(kept_alike)}
    assert len(kept) > 10
    assert all(after[name] == before[name] for name in kept)
    assert after["search.json"] != before["search.json"]


@pytest.mark.parametrize(("option", "first"), [("level_rounds", "plan.json"), ("self_windows", "moments")])
def test_what_is_no_longer_made_is_a_change_too(
    option: str, first: str, run: Path, model_folder: Path, text_file: Path
) -> None:
    before = written(run)
    with pytest.raises(AdaPrunerError, match=rf"\({option} null → 0.*\): {first}, "):
        adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS, **{option: 0})
    assert written(run) == before


def test_an_option_that_decides_nothing_may_change(run: Path, model_folder: Path, text_file: Path) -> None:
    before = written(run)
    adapruner.prune(str(model_folder), output=run, calibration=str(text_file), device="cpu", **OPTIONS)
    assert {name for name, moment in written(run).items() if moment != before.get(name)} == {"config.yaml"}


def test_replaced_weights_are_noticed(model: Path, text_file: Path, tmp_path: Path) -> None:
    options = QUICK | {"calibration": str(text_file)}
    interrupt_behind("statistics.safetensors", model, tmp_path / "run", **options)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdaPrunerError, match=r"another model\): windows.safetensors, .*statistics.safetensors would"):
        adapruner.prune(str(model), output=tmp_path / "run", **options)
    again = adapruner.prune(str(model), output=tmp_path / "run", overwrite=True, **options)
    assert again.plan == adapruner.prune(str(model), output=tmp_path / "fresh", **options).plan


def test_replaced_text_is_noticed(model_folder: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": str(text)}
    interrupt_behind("statistics.safetensors", model_folder, tmp_path / "run", **options)
    paragraphs = text.read_text().split("\n\n")
    text.write_text("\n\n".join(paragraphs[20:]))
    with pytest.raises(AdaPrunerError, match=r"another content of .*text.txt@calibration"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", **options)


def test_another_column_of_a_text_is_another_text(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    rows = [{"a": one, "b": other} for one, other in itertools.pairwise(text_file.read_text().split("\n\n"))]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    interrupt_behind("windows.safetensors", model_folder, tmp_path / "run", calibration=f"{path}:a", **OPTIONS)
    with pytest.raises(AdaPrunerError, match=r"rows.jsonl:a@calibration → .*rows.jsonl:b@calibration"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=f"{path}:b", **OPTIONS)


def test_another_description_of_the_family_rebuilds_what_was_measured(
    run: Path, model_folder: Path, text_file: Path
) -> None:
    other = known_architectures()["llama"].changed(plain_residual=False)
    refusal = r"another family\): moments, statistics.safetensors, whole.json, search.json"
    with using_architecture(other), pytest.raises(AdaPrunerError, match=refusal):
        adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)


def test_a_run_resumes_without_its_text(
    finished: adapruner.PruneResult, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"calibration": str(text)}
    interrupt_behind("evaluation/texts.safetensors", model_folder, tmp_path / "run", **options)
    text.unlink()
    resumed = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert resumed.plan == finished.plan
    assert [model.parameters for model in resumed.result.models] == [
        model.parameters for model in finished.result.models
    ]
    text.write_text("w1 w2")
    with pytest.raises(AdaPrunerError, match="another content"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", **options)


def test_a_folder_is_checked_again_once_it_is_locked(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two different commands start in one new folder: the slower one is refused."""
    options = QUICK | {"calibration": str(text_file)}
    locked = RunFolder.locked

    @contextlib.contextmanager
    def slowly(self: RunFolder) -> Iterator[None]:
        monkeypatch.setattr(RunFolder, "locked", locked)
        adapruner.prune(str(model_folder), output=tmp_path / "run", **options | {"ratio": 0.05})
        with locked(self):
            yield

    monkeypatch.setattr(RunFolder, "locked", slowly)
    with pytest.raises(AdaPrunerError, match=r"ratio 0.05 → 0.1"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert adapruner.prune(str(model_folder), output=tmp_path / "run", **options | {"ratio": 0.05}).plan.ratio < 0.06


def test_the_lock_is_free_after_an_error(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    interrupt_behind("windows.safetensors", model_folder, run.path, calibration=str(text_file), **OPTIONS)
    assert not run.is_running()
    with run.locked():
        assert run.is_running()
        with pytest.raises(AdaPrunerError, match="another command is running in"):
            adapruner.prune(str(model_folder), output=run.path, calibration=str(text_file), **OPTIONS)


def test_several_ratios_share_what_was_measured(
    finished: adapruner.PruneResult,
    run: Path,
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("adapruner.run.nodes.measured.measure_in_parts")
    monkeypatch.delattr("adapruner.run.nodes.measured.measure_moments")
    options = OPTIONS | {"calibration": str(text_file), "ratio": (0.05, 0.1)}
    results = prune_ratios(str(model_folder), output=run, **options)
    assert [result.result.config.ratio for result in results] == [(0.05,), (0.1,)]
    assert [round(result.plan.ratio, 2) for result in results] == [0.05, 0.1]
    assert all(result.result.search.ratio == result.result.config.ratio[0] for result in results)
    # The ratio of the earlier run was not searched again.
    assert results[1].result.search == finished.result.search
    for result in results:
        assert result.report.is_file()
        assert adapruner.load(result.model_folder).num_parameters() > 0
    with pytest.raises(AdaPrunerError, match="names 2 ratios"):
        adapruner.prune(str(model_folder), output=run, **options)


def test_ratios_and_plans_agree_on_the_windows_that_are_left_out(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][40] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options = QUICK | {"calibration": str(text_file), "pool": 40, "objective_windows": 24, "ratio": (0.05, 0.1)}
    first = prune_ratios(str(model), output=tmp_path / "run", **options)
    before = written(tmp_path / "run")
    assert RunFolder(tmp_path / "run").left_out.is_file()
    # Everything has the key that the second call looks for, and what was measured is enough for another ratio.
    with monkeypatch.context() as patch:
        patch.delattr("adapruner.run.nodes.measured.measure_in_parts")
        patch.delattr("adapruner.run.nodes.chosen.Search")
        again = prune_ratios(str(model), output=tmp_path / "run", **options)
        planned = adapruner.plan_again(tmp_path / "run", tmp_path / "plan", 0.08)
    assert [one.plan for one in again] == [one.plan for one in first]
    assert {name for name, moment in written(tmp_path / "run").items() if moment != before[name]} <= {"config.yaml"} | {
        name for name in before if name.endswith("left_out.json")
    }
    assert round(planned.plan.ratio, 2) == 0.08


def test_what_is_taken_over_replaces_the_whole_folder(tmp_path: Path) -> None:
    source, target = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "target")
    for run, names in ((source, ("a", "b")), (target, ("a", "c"))):
        run.model.mkdir(parents=True)
        for name in names:
            (run.model / name).write_text(f"{run.path.name} {name}")
    record = Record(name="model", version=1, options={}, leaves={}, inputs={})
    source.finish("model", record)
    target.take_over("model", source)
    assert {path.name: path.read_text() for path in target.model.iterdir()} == {"a": "source a", "b": "source b"}
    assert target.is_made("model", record.key)


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    """Where scales could not be tuned, an empty file stands for the model before that."""
    source, target = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "target")
    for run in (source, target):
        run.path.mkdir()
        (run.path / "compensated").touch()
    for _ in range(2):
        partial = tmp_path / "partial"
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        replace(partial, source.path / "compensated")
    record = Record(name="compensated", version=1, options={}, leaves={}, inputs={})
    source.finish("compensated", record)
    target.take_over("compensated", source)
    assert (target.path / "compensated" / "config.json").read_text() == "{}"


def test_stages_of_what_was_overwritten_do_not_count(run: Path, model_folder: Path, text_file: Path) -> None:
    options = OPTIONS | {"calibration": str(text_file), "trials": 11, "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, **options)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = {
        name: [one["seconds"] for one in entries if one.get("stage") == name and "seconds" in one]
        for name in ("searching", "measuring")
    }
    assert [len(seconds) for seconds in times.values()] == [2, 1]
    assert result.result.stages["searching"].seconds == times["searching"][-1]
    assert result.result.stages["measuring"].seconds == times["measuring"][0]


def test_a_report_is_not_damage(
    run: Path, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "report.html").open("a") as page:
        page.write("<!-- written by adapruner report -->")
    adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert "damaged" not in capsys.readouterr().err


def test_near_ratios_have_folders_of_their_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.of_ratio(0.2).path.name == "ratio-0.2"
    assert run.of_ratio(0.2).path != run.of_ratio(0.2000001).path


def test_text_that_the_model_writes_depends_on_how_it_computes(model_folder: Path, tmp_path: Path) -> None:
    def leaf(dtype: str) -> Any:
        config = adapruner.PruneConfig.from_options(model=str(model_folder), calibration="self", dtype=dtype, **OPTIONS)
        return Preparation(config, RunFolder(tmp_path), Process(), Reporter()).leaves["pool_text"]

    assert leaf("float32") != leaf("bfloat16")


def test_relative_paths_mean_the_same_from_another_folder(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = adapruner.prune("model", output="run", calibration="text.txt", **QUICK)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Another model of the same name.
    shutil.copytree(model, elsewhere / "model")
    tensors = {name: tensor + 0.1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, elsewhere / "model" / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(elsewhere)
    again = adapruner.plan_again("../run", "again", 0.1)
    assert again.plan == first.plan
    weights = [load_file(tmp_path / place / "model/model.safetensors") for place in ("run", "elsewhere/again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_free_memory_decides_no_number(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adapruner.PruneConfig.from_options(model=str(model_folder), calibration=str(text_file), **OPTIONS)

    def precision(free: int) -> Any:
        monkeypatch.setattr("adapruner.memory._placement._total_and_free", lambda *_: (1 << 36, free))
        prepared = Preparation(config, RunFolder(tmp_path), Process(), Reporter())
        return prepared.leaves["precision"]

    assert precision(1 << 40) == precision(1 << 30)
    with pytest.raises(AdaPrunerError, match="Not enough memory"):
        precision(1000)


def test_variables_that_are_left_in_a_shell_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert this_process() == Process()


def test_every_artifact_stands_behind_its_inputs() -> None:
    seen: set[str] = set()
    for artifact in ARTIFACTS:
        assert all(one.name in seen for one in artifact.inputs), artifact.name
        seen.add(artifact.name)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    small, large = tmp_path / "small.json", tmp_path / "large.safetensors"
    small.write_text('{"a": 1}')
    save_file({"a": torch.zeros(2 << 20)}, large)
    files = stamps([small, large], tmp_path)
    assert are_as_written(files, tmp_path)
    small.write_text('{"a": 2}')
    assert not are_as_written(files, tmp_path)
    small.write_text('{"a": 1}')
    os.truncate(large, large.stat().st_size - 4)
    assert not are_as_written(files, tmp_path)
    large.unlink()
    assert not are_as_written(files, tmp_path)


def test_a_result_of_another_version_is_rebuilt(run: Path, model_folder: Path, text_file: Path) -> None:
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | {"schema_version": 2}))
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert result.result.schema_version == 4

"""The same command again, or another, in the folder of a run: what is kept, what is rebuilt, and what is refused."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import adapruner
from adapruner import AdaPrunerError, PruneConfig
from adapruner.budget.plan import PruningPlan
from adapruner.model.architecture import known_architectures, using_architecture
from adapruner.options import EFFORTS
from adapruner.run.folder import RunFolder
from adapruner.run.options import resolve
from adapruner.text.windows import load_texts_by_use
from run_helpers import (
    RUN_OPTIONS,
    assert_same_artifacts,
    exit_code,
    interrupt_before,
    prune_command,
    run_killed,
    run_killed_before_writing,
    stages_done,
    written,
)

Prune = Callable[..., adapruner.PruneResult]
# What another ratio of a finished run does not do again.
MEASURING = {"writing text", "reading activations", "measuring", "comparing removals", "measuring costs"}


@pytest.fixture
def model(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def text(text_file, tmp_path):
    return Path(shutil.copy(text_file, tmp_path / "text.txt"))


@pytest.fixture
def again(run, prune):
    """Prunes in the copy of the finished run, with changes to its options."""
    return lambda **changes: prune(**RUN_OPTIONS | changes)


def change_weights(model: Path) -> None:
    tensors = {name: tensor + 0.1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 11}, r"\(trials 9 → 11\): search.json, plan.json, .*report.html would be rebuilt"),
        ({"ratio": 0.08}, r"\(ratio 0.1 → 0.08\): search.json, plan.json, "),
        ({"ratio": 0.05}, r"\(another allocation, ratio 0.1 → 0.05\): costs.json, "),
        ({"compensation_windows": 8}, r"\(compensation_windows .* → 8\): windows.safetensors, moments, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_change_is_refused_with_what_it_would_rebuild(changes, message, again, run):
    before = written(run)
    with pytest.raises(AdaPrunerError, match=message):
        again(**changes)
    assert written(run) == before


def test_another_model_text_or_family_is_refused(again, model, text_file, tmp_path):
    change_weights(model)
    with pytest.raises(AdaPrunerError, match=r"another model\): windows.safetensors, .*statistics.safetensors, "):
        again(model=str(model))
    family = known_architectures()["llama"].changed(learned_positions=True)
    message = r"another family\): moments, removals.safetensors, statistics.safetensors, .*search.json"
    with using_architecture(family), pytest.raises(AdaPrunerError, match=message):
        again()
    rows = [{"a": first, "b": second} for first, second in itertools.pairwise(text_file.read_text().split("\n\n"))]
    path, output = tmp_path / "rows.jsonl", tmp_path / "by-column"
    path.write_text("\n".join(map(json.dumps, rows)))
    interrupt_before("reading activations", model, output, calibration=f"{path}:a", **RUN_OPTIONS)
    with pytest.raises(AdaPrunerError, match=r"rows.jsonl:a.* → .*rows.jsonl:b"):
        again(model=str(model), output=output, calibration=f"{path}:b")


def test_another_seed_draws_other_windows(run, model_folder, text_file, tmp_path):
    """That the same seed gives the same plan is tested with every kill."""
    options = RUN_OPTIONS | {"calibration": str(text_file), "seed": 1}
    interrupt_before("reading activations", model_folder, tmp_path / "other", **options)
    drawn = [load_texts_by_use(folder / "windows.safetensors") for folder in (run, tmp_path / "other")]
    assert not torch.equal(drawn[0]["pool"].windows, drawn[1]["pool"].windows)


def test_a_change_rebuilds_what_depends_on_it_and_nothing_else(finished, again, run, monkeypatch):
    before, stages = written(run), stages_done(run)
    other = again(ratio=0.08, overwrite=True)
    assert other.plan.ratio < 0.09
    after, new = written(run), stages_done(run)[len(stages) :]
    dense = (*(f"evaluation/{what}-d" for what in ("perplexity", "abilities")),)
    kept = {
        name for name in before if name.startswith(("windows", "moments", "removals", "statistics", "costs", *dense))
    }
    assert len(kept) > 10
    assert all(after[name] == before[name] for name in kept)
    assert after["search.json"] != before["search.json"]
    assert not MEASURING & {*new}
    # Stages of what was replaced do not count.
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    searching = [entry["seconds"] for entry in entries if entry["stage"] == "searching" and "seconds" in entry]
    assert len(searching) == 2
    assert other.result.stages["searching"].seconds == searching[1]
    assert other.result.stages["measuring"] == finished.result.stages["measuring"]
    # And back: the trials of before are known.
    monkeypatch.delattr(optuna.Study, "tell")
    again(overwrite=True)
    assert_same_artifacts(run, finished.output)


def remove_steps_on_the_way(run: Path) -> None:
    for name in ("windows.safetensors", "statistics.safetensors"):
        (run / name).unlink()
    for name in ("moments", "evaluation"):
        shutil.rmtree(run / name)


def edit_card(run: Path) -> None:
    with (run / "model/README.md").open("a") as card:
        card.write("It writes well.\n")


@pytest.mark.parametrize(
    ("changes", "before"),
    [({}, lambda run: None), ({"device": "cpu"}, lambda run: None), ({}, remove_steps_on_the_way), ({}, edit_card)],
    ids=["the same command", "an option that decides nothing", "steps that were removed", "a card that was edited"],
)
def test_nothing_is_done_twice(changes, before, finished, again, run, capsys):
    before(run)
    there, stages = written(run), stages_done(run)
    result = again(**changes)
    assert (result.plan, result.result) == (finished.plan, finished.result)
    assert {name for name, moment in written(run).items() if moment != there.get(name)} <= {"config.yaml"}
    assert stages_done(run) == stages
    assert "damaged" not in capsys.readouterr().err


def test_a_page_is_written_by_others_too(again, run, capsys):
    with (run / "report.html").open("a") as page:
        page.write("<!-- by adapruner report -->")
    again()
    assert "damaged" not in capsys.readouterr().err


def test_free_memory_decides_no_number(again, tmp_path, monkeypatch):
    for free in (1 << 40, 1 << 30):
        monkeypatch.setattr("adapruner.run.memory.total_and_free", lambda *_, free=free: (1 << 36, free))
        again()
    monkeypatch.setattr("adapruner.run.memory.total_and_free", lambda *_: (1 << 36, 1000))
    with pytest.raises(AdaPrunerError, match="Not enough memory"):
        again(output=tmp_path / "other")


def test_a_run_resumes_without_its_text_and_notices_another(finished, model_folder, text, tmp_path):
    """Once its windows are drawn."""
    options = RUN_OPTIONS | {"calibration": str(text)}
    interrupt_before("reading activations", model_folder, tmp_path / "run", **options)
    content = text.read_text()
    text.unlink()
    resumed = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert resumed.plan == finished.plan
    assert [model.parameters for model in resumed.result.models] == [
        model.parameters for model in finished.result.models
    ]
    text.write_text("\n\n".join(content.split("\n\n")[20:]))
    with pytest.raises(AdaPrunerError, match=r"another content of .*text.txt@calibration"):
        adapruner.prune(str(model_folder), output=tmp_path / "run", **options)


def test_a_run_resumes_without_a_text_of_its_blend(model_folder, text, text_file, tmp_path):
    options = RUN_OPTIONS | {"trials": 0, "calibration": f"{text},{text_file}:0.5"}
    for unused in ("pool", "samples", "objective_windows"):
        options.pop(unused)
    finished = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    text.unlink()
    (tmp_path / "run" / "plan.json").unlink()
    assert adapruner.prune(str(model_folder), output=tmp_path / "run", **options).plan == finished.plan


def test_relative_paths_mean_the_same_from_another_folder(
    finished, again, run, model, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    again(model="model", output="run")
    elsewhere = tmp_path / "elsewhere"
    # Another model of the same name.
    shutil.copytree(model, elsewhere / "model")
    change_weights(elsewhere / "model")
    monkeypatch.chdir(elsewhere)
    taken = adapruner.prune(from_="../run", output="again")
    assert taken.plan == finished.plan
    assert "adapruner recover again" in taken.report.read_text()
    weights = [load_file(folder / "model/model.safetensors") for folder in (run, elsewhere / "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_another_ratio_of_a_run_is_not_measured_or_searched_again(again, run, tmp_path):
    earlier = again()
    for start, ratio, name in ((run, 0.08, "b"), (tmp_path / "b", 0.09, "c")):
        arguments = ["prune", "--from", str(start), "--ratio", str(ratio), "-o", str(tmp_path / name)]
        assert exit_code(arguments) == 0
        stages = stages_done(tmp_path / name)
        assert not (MEASURING | {"searching"}) & {*stages}
        assert exit_code(arguments) == 0
        assert stages_done(tmp_path / name) == stages
    plans = [PruningPlan.load(tmp_path / name / "plan.json") for name in ("b", "c")]
    assert [plan.ratio for plan in plans] == pytest.approx([0.08, 0.09], abs=0.005)
    # The ranking is the same, so of two blocks one keeps what the other keeps.
    for blocks in zip(earlier.plan.blocks, plans[1].blocks, plans[0].blocks, strict=True):
        first, second, third = sorted((set(block.kept) for block in blocks), key=len)
        assert first <= second <= third
    dense = [(folder / "evaluation/perplexity-dense.json").read_bytes() for folder in (run, tmp_path / "b")]
    assert dense[0] == dense[1]
    # The run is another one, and says which search it has.
    config = RunFolder(tmp_path / "c").read_config()
    assert (config.ratio, config.searched) == (0.09, 0.1)
    assert "taken over for this one" in (tmp_path / "c/report.html").read_text()


def test_other_options_of_a_run_are_searched_from_its_measurements(finished, tmp_path):
    other = adapruner.prune(from_=finished.output, output=tmp_path / "other", ratio=0.12, trials=10)
    assert {"searching"} == {*stages_done(tmp_path / "other")} & (MEASURING | {"searching"})
    assert other.result.config == finished.result.config.model_copy(update={"ratio": 0.12, "trials": 10})


def test_another_effort_than_that_of_a_run_replaces_what_it_set(model_folder, tmp_path):
    earlier = RunFolder(tmp_path / "earlier")
    given = {"model": str(model_folder), "effort": "quick", "seq_len": 16, "round_to": 8}
    earlier.path.mkdir()
    earlier.save_config(PruneConfig.from_options(**EFFORTS["quick"] | given, given=sorted(given)))
    config = resolve({"effort": "thorough"}, None, RunFolder(tmp_path / "run"), None, None, earlier)
    expected = EFFORTS["thorough"] | given | {"effort": "thorough", "given": sorted(given), "trials": 0}
    assert config == PruneConfig.from_options(**expected)


def test_a_folder_in_which_a_command_is_running_is_refused(again, run):
    with FileLock(run / ".lock"), pytest.raises(AdaPrunerError, match="another command is running in"):
        again()
    again()


def test_a_result_of_another_version_is_rebuilt(again, run):
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | {"schema_version": 2}))
    assert again().result.schema_version == content["schema_version"]


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    finished, model_folder, text_file, tmp_path, capsys
):
    run = tmp_path / "run"
    arguments = prune_command(model_folder, run, text_file)

    def kill_before_writing(pattern: str) -> None:
        run_killed_before_writing(f"{run}/{pattern}", arguments, tmp_path)

    def kill_after_trials(trials: int) -> None:
        run_killed("optuna.Study", "tell", trials, arguments, tmp_path)

    kills: list[tuple[Callable[[Any], None], Any, str]] = [
        # Three of eight blocks; then the other five, and two of three parts of the pool.
        (kill_before_writing, "unfinished/moments-*/0003.safetensors", "unfinished/moments-*/0002.safetensors"),
        (kill_before_writing, "unfinished/statistics*/000008.safetensors", "unfinished/statistics*/000004.safetensors"),
        (kill_after_trials, 6, "study.jsonl"),
        (kill_before_writing, "model", ".model.partial/model.safetensors"),
    ]
    for kill, moment, left in kills:
        kill(moment)
        assert list(run.glob(left)), moment
        assert not (run / "result.json").exists()
    capsys.readouterr()
    assert exit_code([*arguments, "--json"]) == 0
    completed = capsys.readouterr()
    assert json.loads(completed.out)["plan_hash"] == finished.plan.hash
    assert_same_artifacts(run, finished.output)
    # In a log: one line per stage, no bars; and advice. Nothing that was finished is done twice.
    assert "\r" not in completed.err
    stages = [line for line in completed.err.splitlines() if not line.startswith(("advice: ", "about "))]
    assert all("done in" in line for line in stages)
    named = dict.fromkeys(line.partition(":")[0].partition(" (")[0] for line in stages)
    assert list(named) == ["loading", "writing answers", "solving built-in tasks", "evaluating", "comparing abilities"]


def test_a_part_that_was_cut_off_is_measured_again(finished, model_folder, text_file, tmp_path):
    run = tmp_path / "run"
    arguments = prune_command(model_folder, run, text_file)
    run_killed_before_writing(f"{run}/unfinished/statistics*/000008.safetensors", arguments, tmp_path)
    [part] = run.glob("unfinished/statistics*/000004.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    assert exit_code(arguments) == 0
    assert_same_artifacts(run, finished.output)

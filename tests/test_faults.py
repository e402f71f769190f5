"""What goes wrong around a run: damaged files, signals, a full disk, no memory, numbers that are none."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError
from adapruner.search import judging as _objective
from adapruner.text.windows import load_texts_by_use
from run_helpers import (
    QUICK,
    RUN_OPTIONS,
    assert_same_artifacts,
    exit_code,
    prune_command,
    said_by,
    stages_done,
    start_main,
    written,
)

Rerun = Callable[[], int]


@pytest.fixture
def rerun(run, model_folder, text_file):
    """Runs the command of the finished run again, in its copy."""
    return lambda: exit_code(prune_command(model_folder, run, text_file))


def assert_same_cards(run: Path, undisturbed: Path) -> None:
    cards = [(folder / "model/README.md").read_text() for folder in (run, undisturbed)]
    assert cards[0] == cards[1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path) -> None:
    """Changes the file and leaves it well-formed."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name = max(tensors)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})
    elif path.suffix == ".html":  # a large file, known by its size
        path.write_text(path.read_text() + "\n")
    else:
        digit = next(digit for digit in "123456789" if digit in path.read_text())
        path.write_text(path.read_text().replace(digit, str(int(digit) % 9 + 1), 1))


# A file of every artifact.
FILES = {
    "windows.safetensors": "windows.safetensors",
    "evaluation/texts.safetensors": "evaluation/texts.safetensors",
    "moments/0003.safetensors": "moments",
    "removals.safetensors": "removals.safetensors",
    "statistics.safetensors": "statistics.safetensors",
    "costs.json": "costs.json",
    "search.json": "search.json",
    "plan.json": "plan.json",
    "model/model.safetensors": "model",
    "model/config.json": "model",
    "evaluation/perplexity-dense.json": "evaluation/perplexity-dense.json",
    "evaluation/perplexity-pruned.json": "evaluation/perplexity-pruned.json",
    "evaluation/abilities-pruned.json": "evaluation/abilities-pruned.json",
    "result.json": "result.json",
    "report.html": "report.html",
}


@pytest.mark.parametrize("damage", [truncate, edit])
def test_what_was_damaged_is_rebuilt(damage, finished, run, rerun, capsys):
    for file in FILES:
        damage(run / file)
    assert rerun() == 0
    said = capsys.readouterr().err
    # The page is written by `adapruner report` too.
    for artifact in set(FILES.values()) - {"report.html"}:
        assert said.count(f"{run / artifact} was changed or damaged since it was written: rebuilding it") == 1
    assert_same_artifacts(run, finished.output)


def test_damage_takes_nothing_else_along(finished, run, rerun):
    for artifact in ("statistics.safetensors", "plan.json", "model", "evaluation/perplexity-dense.json"):
        before = written(run)
        place = run / artifact
        edit(place / "config.json" if place.is_dir() else place)
        edited = written(run)
        assert rerun() == 0
        replaced = {name for name, moment in written(run).items() if moment != edited[name]}
        files = {name for name in before if name == artifact or name.startswith(f"{artifact}/")}
        # The model card follows from the result.
        beside = {"keys/result.json.json", "result.json"} if artifact == "model" else set()
        assert replaced - {"config.yaml"} == files | {f"keys/{artifact.replace('/', '-')}.json"} | beside
    assert_same_artifacts(run, finished.output)
    assert_same_cards(run, finished.output)


def test_a_damaged_file_of_trials_is_one_line(finished, run, rerun, capsys):
    (run / "search.json").unlink()
    trials = run / "study.jsonl"
    trials.write_bytes(b"damaged\n" * 1000)
    assert rerun() == 2
    assert f"{trials} is damaged" in capsys.readouterr().err.splitlines()[-1]
    trials.unlink()
    assert rerun() == 0
    assert_same_artifacts(run, finished.output)


@pytest.mark.parametrize("name", ["search.json", "plan.json", "model", "model/config.json", "report.html"])
def test_results_that_were_removed_are_rebuilt(name, finished, run, rerun, monkeypatch, capsys):
    """From what is there: nothing is measured, tried or evaluated again; and it is no damage."""
    monkeypatch.delattr(optuna.Study, "tell")
    stages = stages_done(run)
    shutil.rmtree(run / name) if name == "model" else (run / name).unlink()
    assert rerun() == 0
    assert not {"reading activations", "measuring", "evaluating"} & {*stages_done(run)[len(stages) :]}
    assert "damaged" not in capsys.readouterr().err
    assert_same_artifacts(run, finished.output)
    assert_same_cards(run, finished.output)
    # What stages took stays known.
    taken = [json.loads((folder / "result.json").read_text())["stages"] for folder in (run, finished.output)]
    assert taken[0]["evaluating"] == taken[1]["evaluating"]


def test_another_ratio_is_mended_by_its_own_command(finished, tmp_path, capsys):
    other = tmp_path / "[old]:train:"
    again = ["prune", "--from", str(finished.output), "--ratio", "0.05", "-o", str(other)]
    assert exit_code(again) == 0
    shutil.copytree(other, tmp_path / "first")
    truncate(other / "result.json")
    edit(other / "model/model.safetensors")
    (other / "report.html").unlink()
    assert exit_code(again) == 0
    assert f"model: {other / 'model'} " in capsys.readouterr().out
    assert_same_artifacts(other, tmp_path / "first")
    # Names are shown as they are, not as markup or emoji.
    assert exit_code(["report", str(other)]) == 0
    assert f"report: {other / 'report.html'}\n" in capsys.readouterr().out


def test_a_report_of_what_cannot_be_read_is_refused(run, capsys):
    truncate(run / "windows.safetensors")
    assert exit_code(["report", str(run)]) == 2
    assert "cannot read the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("result.json", '{"schema_version": 99}', "schema_version: Input should be 13"),
        ("result.json", "[1]", "Input should be an object"),
        ("speed.json", "[1]", "Input should be an object"),
    ],
)
def test_a_report_of_another_version_names_the_file(name, content, problem, run, capsys):
    (run / name).write_text(content)
    assert exit_code(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run / name} is of another version of adapruner, or was changed ({problem}): rerun the command" in said


def test_an_encoding_without_all_signs_stops_nothing(finished, tmp_path, monkeypatch):
    """As with LC_ALL=C and PYTHONUTF8=0."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert exit_code(["prune", "--from", str(finished.output), "--ratio", "0.05", "-o", str(tmp_path / "…")]) == 0
    assert b"\\u2026" in written.getvalue()


def test_another_ratio_is_not_made_from_damaged_measurements(finished, run, tmp_path):
    """They are rebuilt where something needs them; the earlier run is not touched."""
    edit(run / "statistics.safetensors")
    damaged = (run / "statistics.safetensors").read_bytes()
    assert exit_code(["prune", "--from", str(run), "--ratio", "0.08", "-o", str(tmp_path / "other")]) == 0
    for name, source in (("statistics.safetensors", finished.output), ("search.json", run)):
        assert (tmp_path / "other" / name).read_bytes() == (source / name).read_bytes()
    assert (run / "statistics.safetensors").read_bytes() == damaged


@pytest.fixture
def measured(run):
    """A copy of the finished run in which nothing after the measuring was made."""
    for name in ("evaluation", "model"):
        shutil.rmtree(run / name)
    for name in ("study.jsonl", "search.json", "plan.json", "result.json", "report.html"):
        (run / name).unlink()
    return run


@pytest.fixture
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_trial_end_and_the_run_resumes(number, finished, measured, rerun, monkeypatch, capsys):
    told = 0
    ask, tell = optuna.Study.ask, optuna.Study.tell

    def interrupted(self: optuna.Study, *arguments: Any, **named: Any) -> optuna.Trial:
        if told == 3:
            os.kill(os.getpid(), number)
        return ask(self, *arguments, **named)

    def counted(self: optuna.Study, *arguments: Any, **named: Any) -> Any:
        nonlocal told
        told += 1
        return tell(self, *arguments, **named)

    monkeypatch.setattr(optuna.Study, "tell", counted)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", interrupted)
        assert rerun() == 128 + number
    assert "stopping after this trial" in capsys.readouterr().err
    assert told == 4
    assert rerun() == 0
    assert told == RUN_OPTIONS["trials"]
    assert_same_artifacts(measured, finished.output)


@pytest.mark.usefixtures("_signals_as_before")
def test_a_signal_while_measuring_keeps_what_was_measured(finished, measured, rerun, monkeypatch):
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "000000.safetensors":
            os.kill(os.getpid(), signal.SIGINT)

    (measured / "statistics.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert rerun() == 130
    [unfinished] = (measured / "unfinished").iterdir()
    assert [path.name for path in unfinished.iterdir()] == ["000000.safetensors"]
    assert unfinished.name.startswith("statistics.safetensors-")
    assert rerun() == 0
    assert_same_artifacts(measured, finished.output)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_the_run_resumes(small_disk, finished, model_folder, text_file, capsys):
    run = small_disk / "run"
    capsys.readouterr()
    for size in (96, 192, 384):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        assert exit_code(prune_command(model_folder, run, text_file)) == 2
        last = capsys.readouterr().err.splitlines()[-1].lower()
        assert "no space left" in last or "disk is full" in last
        assert "adapruner:" in last
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert exit_code(prune_command(model_folder, run, text_file)) == 0
    assert_same_artifacts(run, finished.output)


def let_a_trial_run_out_of_memory() -> None:
    """The limit leaves room for the database and for what is said, and none for what the trial asks for."""
    import resource

    def without_memory(*_: Any) -> PreTrainedModel:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20), -1))
        torch.empty(4 << 30, dtype=torch.uint8)
        raise AssertionError

    _objective.prune_model = without_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_memory_is_one_line_and_the_run_resumes(model_folder, text_file, tmp_path):
    arguments = prune_command(model_folder, tmp_path / "run", text_file, QUICK)
    process = start_main(let_a_trial_run_out_of_memory, (), arguments, tmp_path)
    process.join()
    said = said_by(process, tmp_path)
    assert process.exitcode == 2, said
    assert "out of memory: --layer-wise needs less memory" in said.splitlines()[-1]
    assert exit_code(arguments) == 0


def with_broken_embedding(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: slice
) -> Path:
    model.get_input_embeddings().weight.data[tokens] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_samples_that_break_the_model_are_left_out_and_named(model, tokenizer, text_file, tmp_path, capsys):
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(40, 41))
    options = QUICK | {"pool": 40, "objective_windows": 24, "calibration": str(text_file)}
    run = tmp_path / "run"
    first = adapruner.prune(str(folder), output=run, **options)
    said = capsys.readouterr().err
    assert "not finite: windows [" in said
    assert said.count("left out") == 3
    texts = load_texts_by_use(run / "windows.safetensors")
    for use, kept in texts.items():
        assert not (kept.windows == 40).any(), use
        assert first.result.windows[use] == {str(text_file): len(kept)}
    assert len(texts["pool"]) >= 4
    assert first.result.search.best_loss < 100
    # They are known when the run is resumed, and what was measured is enough for another ratio.
    before, stages = written(run), stages_done(run)
    assert adapruner.prune(str(folder), output=run, **options).plan == first.plan
    assert stages_done(run) == stages
    assert {name for name, moment in written(run).items() if moment != before[name]} <= {"config.yaml"}
    other = adapruner.prune(from_=run, output=tmp_path / "other", ratio=0.08)
    assert round(other.plan.ratio, 2) == 0.08
    assert not {"reading activations", "measuring", "searching"} & {*stages_done(tmp_path / "other")}


def test_a_broken_model_is_refused(model, tokenizer, text_file, tmp_path):
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(0, 90))
    with pytest.raises(
        AdaPrunerError, match=r"not finite on (\d+) of the \1 windows of the \w+: its weights are broken"
    ):
        adapruner.prune(str(folder), output=tmp_path / "run", calibration=str(text_file), **RUN_OPTIONS)

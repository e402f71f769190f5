"""What goes wrong around a run: damaged files, signals, a full disk, no memory, numbers that are none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError
from adapruner.cli import main
from adapruner.graph import RunFolder
from adapruner.run.nodes import measured as _statistics
from adapruner.search import Candidate, Objective, Search, StudyFile, _objective
from run_helpers import QUICK, assert_same_artifacts, flags, said_by, start_main
from run_helpers import RUN_OPTIONS as OPTIONS


def command(model: Path, output: Path, text: Path, options: dict[str, Any] = OPTIONS) -> list[str]:
    return ["prune", str(model), "-o", str(output), "--calibration", str(text), *flags(options)]


def exit_code(arguments: list[str]) -> object:
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def run(finished: adapruner.PruneResult, tmp_path: Path) -> RunFolder:
    """A copy of the finished run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return RunFolder(tmp_path / "run")


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
    "statistics.safetensors": "statistics.safetensors",
    "search.json": "search.json",
    "plan.json": "plan.json",
    "model/model.safetensors": "model",
    "model/config.json": "model",
    "evaluation/perplexity-dense.json": "evaluation/perplexity-dense.json",
    "evaluation/perplexity-best_fixed.json": "evaluation/perplexity-best_fixed.json",
    "evaluation/perplexity-searched.json": "evaluation/perplexity-searched.json",
    "evaluation/breakage-searched.json": "evaluation/breakage-searched.json",
    "result.json": "result.json",
    "report.html": "report.html",
}


def made(run: RunFolder) -> set[str]:
    """The artifacts that are as they were written."""
    records = {name: run.record(name) for name in FILES.values()}
    return {name for name, record in records.items() if record and run.is_made(name, record.key)}


@pytest.mark.parametrize("damage", [truncate, edit])
def test_damage_is_recognised_in_every_file(damage: Callable[[Path], None], run: RunFolder) -> None:
    assert made(run) == set(FILES.values())
    for file, artifact in FILES.items():
        content = (run.path / file).read_bytes()
        damage(run.path / file)
        assert made(run) == set(FILES.values()) - {artifact}, file
        assert not run.is_removed(artifact)
        (run.path / file).write_bytes(content)
    assert made(run) == set(FILES.values())


@pytest.mark.parametrize("damage", [truncate, edit])
def test_what_was_damaged_is_rebuilt(
    damage: Callable[[Path], None],
    finished: adapruner.PruneResult,
    run: RunFolder,
    model_folder: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in FILES:
        damage(run.path / file)
    assert exit_code(command(model_folder, run.path, text_file)) == 0
    said = capsys.readouterr().err
    # The page is written by `adapruner report` too.
    for artifact in set(FILES.values()) - {"report.html"}:
        assert said.count(f"{run.path / artifact} was changed or damaged since it was written: rebuilding it") == 1
    assert_same_artifacts(run.path, finished.output)


def test_damage_takes_nothing_else_along(
    finished: adapruner.PruneResult, run: RunFolder, model_folder: Path, text_file: Path
) -> None:
    for artifact in ("statistics.safetensors", "plan.json", "model", "evaluation/perplexity-dense.json"):
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
        place = run.path / artifact
        edit(place / "config.json" if place.is_dir() else place)
        assert exit_code(command(model_folder, run.path, text_file)) == 0
        written = {path for path, moment in before.items() if path.stat().st_mtime_ns != moment}
        own = {path for path in before if path == place or place in path.parents}
        record = run.path / "keys" / f"{artifact.replace('/', '-')}.json"
        # The model card follows from the result.
        beside = {run.path / "keys/result.json.json", run.path / "result.json"} if artifact == "model" else set()
        assert written - {run.config, run.log, run.path / ".lock"} == own | {record} | beside, artifact
    assert_same_artifacts(run.path, finished.output)
    cards = [(folder / "model/README.md").read_text() for folder in (run.path, finished.output)]
    assert cards[0] == cards[1]


def test_damaged_records_are_not_relied_on(
    finished: adapruner.PruneResult, run: RunFolder, model_folder: Path, text_file: Path
) -> None:
    for record in (run.path / "keys").iterdir():
        truncate(record)
    assert exit_code(command(model_folder, run.path, text_file)) == 0
    assert_same_artifacts(run.path, finished.output)


def test_a_damaged_file_of_trials_is_one_line(
    finished: adapruner.PruneResult,
    run: RunFolder,
    model_folder: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run.path / "search.json").unlink()
    run.study.write_bytes(b"damaged\n" * 1000)
    assert exit_code(command(model_folder, run.path, text_file)) == 2
    assert f"{run.study} is damaged" in capsys.readouterr().err.splitlines()[-1]
    run.study.unlink()
    assert exit_code(command(model_folder, run.path, text_file)) == 0
    assert_same_artifacts(run.path, finished.output)


@pytest.mark.parametrize("name", ["search.json", "plan.json", "model", "model/config.json", "report.html"])
def test_results_that_were_removed_are_rebuilt(
    name: str,
    finished: adapruner.PruneResult,
    run: RunFolder,
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From what is there: nothing is measured, tried or evaluated again; and it is no damage."""
    for forbidden in ("_statistics.measure_in_parts", "_statistics.measure_moments", "_evaluation.measure_perplexity"):
        monkeypatch.delattr(f"adapruner.procedure.{forbidden}")
    monkeypatch.delattr(Search, "_run_trial")
    shutil.rmtree(run.path / name) if name == "model" else (run.path / name).unlink()
    assert exit_code(command(model_folder, run.path, text_file)) == 0
    assert "damaged" not in capsys.readouterr().err
    assert_same_artifacts(run.path, finished.output)
    cards = [(folder / "model/README.md").read_text() for folder in (run.path, finished.output)]
    assert cards[0] == cards[1]
    # What stages took stays known.
    stages = [json.loads((each / "result.json").read_text())["stages"] for each in (run.path, finished.output)]
    assert stages[0]["evaluating"] == stages[1]["evaluating"]


def test_a_card_is_for_people_to_edit(
    run: RunFolder, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = run.model / "README.md"
    own = card.read_text() + "It writes well.\n"
    card.write_text(own)
    assert exit_code(command(model_folder, run.path, text_file)) == 0
    assert card.read_text() == own
    assert "damaged" not in capsys.readouterr().err


def test_what_was_only_measured_on_the_way_may_be_removed(
    finished: adapruner.PruneResult,
    run: RunFolder,
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for artifact in ("windows.safetensors", "statistics.safetensors"):
        (run.path / artifact).unlink()
    for folder in ("moments", "evaluation"):
        shutil.rmtree(run.path / folder)
    monkeypatch.delattr("adapruner.run.nodes.inputs.load_model")
    again = adapruner.prune(str(model_folder), output=run.path, calibration=str(text_file), **OPTIONS)
    assert again.result == finished.result


def test_a_kill_while_a_damaged_model_is_replaced(
    finished: adapruner.PruneResult,
    run: RunFolder,
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edit(run.model / "config.json")
    rename = os.replace

    def stop_before_the_last(source: Path, target: Path) -> None:
        if Path(target) == run.model:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("adapruner.files.os.replace", stop_before_the_last)
        with pytest.raises(KeyboardInterrupt):
            adapruner.prune(str(model_folder), output=run.path, calibration=str(text_file), **OPTIONS)
    assert not run.model.exists()
    # With the folder went the card that the result writes in it.
    assert made(run) == set(FILES.values()) - {"model", "result.json"}
    adapruner.prune(str(model_folder), output=run.path, calibration=str(text_file), **OPTIONS)
    assert_same_artifacts(run.path, finished.output)
    assert not list(run.path.glob(".*.old"))


def test_another_ratio_is_mended_by_its_own_command(
    finished: adapruner.PruneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "[old]:train:"
    again = ["plan", str(finished.output), "--ratio", "0.05", "-o", str(other)]
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


def test_a_report_of_what_cannot_be_read_is_refused(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(run.path / "windows.safetensors")
    assert exit_code(["report", str(run.path)]) == 2
    assert "cannot read the run in" in capsys.readouterr().err


def test_another_ratio_is_not_made_from_damaged_measurements(
    finished: adapruner.PruneResult, run: RunFolder, tmp_path: Path
) -> None:
    """They are rebuilt where something needs them; the earlier run is not touched."""
    edit(run.path / "statistics.safetensors")
    damaged = (run.path / "statistics.safetensors").read_bytes()
    assert exit_code(["plan", str(run.path), "--ratio", "0.05", "-o", str(tmp_path / "other")]) == 0
    other = RunFolder(tmp_path / "other")
    assert other.record("statistics.safetensors") == RunFolder(finished.output).record("statistics.safetensors")
    assert other.record("search.json") == run.record("search.json")
    assert (run.path / "statistics.safetensors").read_bytes() == damaged


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_trial_end_and_the_run_resumes(
    number: signal.Signals,
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judged = 0
    judge = Objective.__call__

    def interrupted(self: Objective, candidate: Candidate) -> Iterator[Tensor]:
        nonlocal judged
        judged += 1
        if judged == 4:
            os.kill(os.getpid(), number)
        return judge(self, candidate)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", interrupted)
        assert exit_code(command(model_folder, run, text_file)) == 128 + number
    assert "stopping after this trial" in capsys.readouterr().err
    assert judged == 4
    record = RunFolder(run).record("search.json")
    assert record is not None
    assert len(StudyFile(RunFolder(run).study, record.key).finished()) == 4
    assert not RunFolder(run).is_running()
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_artifacts(run, finished.output)


@pytest.mark.usefixtures("_signals_as_before")
def test_a_signal_while_measuring_keeps_what_was_measured(
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = _statistics.write_atomically

    def interrupted(path: Path, save: Callable[[Path], Any]) -> None:
        write(path, save)
        if "statistics" in path.parent.name:
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(_statistics, "write_atomically", interrupted)
        assert exit_code(command(model_folder, run, text_file)) == 130
    [unfinished] = (run / "unfinished").iterdir()
    assert [path.name for path in unfinished.iterdir()] == ["000000.safetensors"]
    assert unfinished.name.startswith("statistics.safetensors-")
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_artifacts(run, finished.output)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_the_run_resumes(
    small_disk: Path,
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = small_disk / "run"
    capsys.readouterr()
    for size in (96, 192, 384):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        assert exit_code(command(model_folder, run, text_file)) == 2
        last = capsys.readouterr().err.splitlines()[-1].lower()
        assert "no space left" in last or "disk is full" in last
        assert "adapruner:" in last
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert exit_code(command(model_folder, run, text_file)) == 0
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
def test_no_memory_is_one_line_and_the_run_resumes(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = command(model_folder, tmp_path / "run", text_file, QUICK)
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


def test_samples_that_break_the_model_are_left_out_and_named(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(40, 41))
    options = QUICK | {"pool": 40, "objective_windows": 24, "final_windows": 8}
    result = adapruner.prune(str(folder), output=tmp_path / "run", calibration=str(text_file), **options)
    said = capsys.readouterr().err
    assert "not finite: windows [" in said
    assert said.count("left out") == 3
    drawn = load_file(tmp_path / "run" / "windows.safetensors")
    left_out = json.loads((tmp_path / "run" / "left_out.json").read_text())["windows"]
    assert left_out.keys() == drawn.keys()
    for use, windows in drawn.items():
        assert left_out[use] == torch.nonzero((windows == 40).any(1)).flatten().tolist(), use
        assert result.result.windows[use] == len(windows) - len(left_out[use])
    assert result.result.windows["pool"] >= 4
    assert result.result.search.best_loss < 100
    # They are known when the run is resumed.
    with monkeypatch.context() as patch:
        patch.delattr("adapruner.run.nodes.inputs.load_model")
        again = adapruner.prune(str(folder), output=tmp_path / "run", calibration=str(text_file), **options)
    assert again.result.model_dump_json() == result.result.model_dump_json()
    # Of other windows, others are left out.
    options |= {"seed": 1, "overwrite": True}
    other = adapruner.prune(str(folder), output=tmp_path / "run", calibration=str(text_file), **options)
    assert json.loads((tmp_path / "run" / "left_out.json").read_text())["windows"] != left_out
    assert other.plan.hash != result.plan.hash


def test_a_broken_model_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(0, 90))
    with pytest.raises(
        AdaPrunerError, match=r"not finite on (\d+) of the \1 windows of the \w+: its weights are broken"
    ):
        adapruner.prune(str(folder), output=tmp_path / "run", calibration=str(text_file), **OPTIONS)

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
from adapruner.run import RunFolder
from adapruner.search import Candidate, Objective

OPTIONS: dict[str, Any] = {
    "ratio": 0.1,
    "pool": 12,
    "samples": 4,
    "objective_windows": 6,
    "seq_len": 16,
    "trials": 9,
    "protect_first": 1,
    "protect_last": 1,
    "round_to": 1,
}


def command(model: Path, output: Path, text: Path) -> list[str]:
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["prune", str(model), "-o", str(output), "--calibration", str(text), "--evaluate", str(text), *flags]


def exit_code(arguments: list[str]) -> object:
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert exit_code(command(model_folder, output, text_file)) == 0
    return output


def assert_same_outcome(run: Path, undisturbed: Path) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, undisturbed)]
    assert results[0]["plan_hash"] == results[1]["plan_hash"]
    assert results[0]["search"] == results[1]["search"]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (run, undisturbed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path) -> None:
    """Changes one value and leaves the file well-formed."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name = max(tensors)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})
    else:
        digit = next(digit for digit in "123456789" if digit in path.read_text())
        path.write_text(path.read_text().replace(digit, str(int(digit) % 9 + 1), 1))


ARTIFACTS = {
    "windows.safetensors": "windows.safetensors",
    "moments/0003.safetensors": "moments/0003.safetensors",
    "statistics.safetensors": "statistics.safetensors",
    "search.json": "search.json",
    "plan.json": "plan.json",
    "model/model.safetensors": "model",
    "model/config.json": "model",
    "evaluation.json": "evaluation.json",
}


@pytest.mark.parametrize("damage", [truncate, edit])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_damage_is_recognised_and_takes_nothing_else_along(
    damage: Callable[[Path], None], name: str, finished: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.path)
    before = {path for path in run.path.rglob("*") if path.is_file()}
    damage(run.path / name)
    gone = run.path / ARTIFACTS[name]
    assert run.discard_damaged() == sorted([gone, run.result])
    left = {path for path in before if path not in (gone, run.result) and gone not in path.parents}
    assert {path for path in run.path.rglob("*") if path.is_file()} == left
    assert run.manifest.damaged() == []


@pytest.mark.parametrize("damage", [truncate, edit])
def test_what_was_damaged_is_made_again(
    damage: Callable[[Path], None],
    finished: Path,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ARTIFACTS:
        damage(run / name)
    assert exit_code(command(model_folder, run, text_file)) == 0
    said = capsys.readouterr().err
    for name in set(ARTIFACTS.values()):
        assert f"{run / name} was changed or damaged since it was written: it is made again" in said
    assert_same_outcome(run, finished)
    # A manifest that names nothing more is no reason to take what cannot be read.
    damage(run / "result.json")
    (run / "manifest.json").write_text("{}" if damage is truncate else (run / "manifest.json").read_text())
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_outcome(run, finished)


@pytest.mark.parametrize("name", ["study.journal", "study.json", "manifest.json"])
def test_a_search_goes_on_though_its_records_are_damaged(
    name: str,
    finished: Path,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "search.json").unlink()
    (run / "result.json").unlink()
    content = (run / name).read_text()
    (run / name).write_text(f"{content[: len(content) // 2]}\n{{\n")
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert ("damaged" in capsys.readouterr().err) == (name != "manifest.json")
    assert_same_outcome(run, finished)


@pytest.mark.parametrize("name", ["search.json", "plan.json", "model/model.safetensors", "model"])
def test_results_that_were_removed_are_made_again(
    name: str, finished: Path, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / name) if name == "model" else (run / name).unlink()
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert f"{run / name.partition('/')[0]} was changed or damaged" in capsys.readouterr().err
    assert_same_outcome(run, finished)
    # What stages took stays known.
    stages = [json.loads((each / "result.json").read_text())["stages"] for each in (run, finished)]
    assert stages[0]["evaluating"] == stages[1]["evaluating"]


def test_what_was_only_measured_on_the_way_may_be_removed(finished: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.path)
    shutil.rmtree(run.moments)
    assert run.discard_damaged() == []


@pytest.mark.parametrize("with_compensation", [True, False])
def test_what_was_measured_of_other_windows_goes(with_compensation: bool, finished: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.path)
    run.statistics_parts.mkdir()
    before = load_file(run.windows)
    windows = before | {"pool": before["pool"][1:]}
    if with_compensation:
        windows["compensation"] = before["compensation"][1:]
    run.replace_windows(windows)
    assert len(load_file(run.windows)["pool"]) == len(before["pool"]) - 1
    assert not any(path.exists() for path in (run.study, run.journal, run.statistics_parts))
    assert run.moments.exists() != with_compensation
    assert run.manifest.damaged() == []


def test_a_kill_while_a_model_is_removed_leaves_it_known_as_damaged(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.path)
    edit(run.model / "config.json")

    def remove_a_part(folder: Path, **_: bool) -> None:
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("adapruner.run_folder.shutil.rmtree", remove_a_part)
        with pytest.raises(KeyboardInterrupt):
            run.discard_damaged()
    assert run.model.is_dir()
    assert run.model in run.discard_damaged()
    assert not run.model.exists()


def test_another_ratio_is_mended_by_its_own_command(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "[old]:train:"
    again = ["plan", str(finished), "--ratio", "0.05", "-o", str(other)]
    assert exit_code(again) == 0
    first = json.loads((other / "result.json").read_text())
    truncate(other / "result.json")
    edit(other / "model/model.safetensors")
    (other / "report.html").unlink()
    assert exit_code(again) == 0
    assert f"model: {other / 'model'} " in capsys.readouterr().out
    assert json.loads((other / "result.json").read_text())["plan_hash"] == first["plan_hash"]
    assert (other / "report.html").is_file()
    assert RunFolder(other).manifest.damaged() == []
    # Names are shown as they are, not as markup or emoji.
    assert exit_code(["report", str(other)]) == 0
    assert f"report: {other / 'report.html'}\n" in capsys.readouterr().out


def test_a_report_of_what_cannot_be_read_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    truncate(run / "windows.safetensors")
    assert exit_code(["report", str(run)]) == 2


def test_another_ratio_is_not_made_from_damaged_measurements(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    edit(run / "statistics.safetensors")
    assert exit_code(["plan", str(run), "--ratio", "0.05", "-o", str(tmp_path / "other")]) == 2
    assert "statistics.safetensors was changed or damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_trial_end_and_the_run_goes_on(
    number: signal.Signals,
    finished: Path,
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
    trials = [json.loads(line) for line in (run / "study.journal").read_text().splitlines()]
    assert sum(trial["op_code"] == 6 and trial.get("state") == 1 for trial in trials) == 4
    assert not (run / "locks").exists()
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_outcome(run, finished)


@pytest.mark.usefixtures("_signals_as_before")
def test_a_signal_while_measuring_keeps_what_was_measured(
    finished: Path, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_part = RunFolder.save_part

    def interrupted(self: RunFolder, *arguments: Any) -> None:
        save_part(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_part", interrupted)
        assert exit_code(command(model_folder, run, text_file)) == 130
    assert [path.name for path in (run / "statistics.parts").iterdir()] == ["000000-4.safetensors"]
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_outcome(run, finished)


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


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    small_disk: Path, finished: Path, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    capsys.readouterr()
    for size in (96, 192, 384):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        assert exit_code(command(model_folder, run, text_file)) == 2
        last = capsys.readouterr().err.splitlines()[-1].lower()
        assert "no space left" in last
        assert "adapruner:" in last
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert exit_code(command(model_folder, run, text_file)) == 0
    assert_same_outcome(run, finished)


OUT_OF_MEMORY = """
import resource
from pathlib import Path
from adapruner.cli import main
from adapruner.run import RunFolder

save_part = RunFolder.save_part

def then_without_memory(*arguments):
    save_part(*arguments)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), -1))

RunFolder.save_part = then_without_memory
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_memory_is_one_line_and_the_run_goes_on(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = command(model_folder, tmp_path / "run", text_file)
    process = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, *arguments], capture_output=True, check=False, text=True
    )
    assert process.returncode == 2, process.stderr
    assert "out of memory: --layer-wise takes less" in process.stderr.splitlines()[-1]
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(40, 41))
    options = OPTIONS | {"pool": 40, "objective_windows": 24}
    result = adapruner.prune(str(folder), tmp_path / "run", calibration=str(text_file), **options)
    windows = load_file(tmp_path / "run" / "windows.safetensors")
    assert 4 <= len(windows["pool"]) < 40
    assert not any((each == 40).any() for each in windows.values())
    said = capsys.readouterr().err
    drawn = adapruner.prune(str(folder), tmp_path / "other", calibration=str(text_file), **options | {"seed": 1})
    assert "not finite: windows [" in said
    assert said.count("left out") == 3
    assert result.result["search"]["best_loss"] < 100
    assert drawn.plan.hash != result.plan.hash


def test_a_broken_model_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    folder = with_broken_embedding(tmp_path / "model", model, tokenizer, slice(0, 90))
    with pytest.raises(AdaPrunerError, match=r"not finite on 12 of the 12 windows of the pool: its weights are broken"):
        adapruner.prune(str(folder), tmp_path / "run", calibration=str(text_file), **OPTIONS)

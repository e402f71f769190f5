"""What an experiment tracker is told, and that it is told nothing unasked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import adapruner
from adapruner import AdaPrunerError
from adapruner.tracking import Tracking
from run_helpers import QUICK, RUN_OPTIONS, fast_starts


class Noting(GeneralTracker):
    """Takes the place of W&B's; fails from its `fails_at`th step on."""

    name, requires_logging_directory, tracker = "wandb", False, None
    told: list[tuple[dict[str, float], int]]
    runs: list[tuple[str, str]]
    fails_at: int

    def __init__(self, project: str, name: str) -> None:
        super().__init__()
        self.runs.append((project, name))

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.told.append((values, int(step or 0)))

    def finish(self) -> None:
        self.told.append(({"finished": 1.0}, 0))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> type[Noting]:
    kind = type("Kind", (Noting,), {"told": [], "runs": [], "fails_at": -1})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", kind)
    monkeypatch.setattr("adapruner.tracking.find_spec", lambda name: name)
    return kind


def test_a_run_tells_trials_training_stages_and_perplexities(
    wandb: type[Noting], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    text = str(text_file)
    recovery = {"steps": 4, "batch_size": 4, "seq_len": 16, "validation": 4}
    options = QUICK | {"calibration": text, "evaluate": [text], "recover": text, "recovery": recovery}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", track="wandb", **options).result
    assert wandb.runs == [("adapruner", "run")]
    *told, last = wandb.told
    assert last[0] == {"finished": 1.0}
    assert [step for _, step in told] == list(range(len(told)))

    def values(name: str) -> list[float]:
        return [numbers[name] for numbers, _ in told if name in numbers]

    losses = [point.loss for point in result.search.points]
    assert values("trials/loss") == losses
    assert values("trials/best loss") == [min(losses[: count + 1]) for count in range(len(losses))]
    assert len(values("recovery/loss")) == 4
    assert result.recovery is not None
    assert values("recovery/eval_loss")[0] == result.recovery.loss_before
    stages = {name.partition("/")[2] for numbers, _ in told for name in numbers if name.startswith("seconds")}
    assert stages == set(result.stages)
    [perplexity] = result.model("recovered").perplexity.values()
    assert [number for numbers, _ in told for name, number in numbers.items() if "perplexity recovered" in name] == [
        perplexity.perplexity
    ]


def test_nothing_is_told_unasked(
    wandb: type[Noting], finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Neither of trials, nor of stages and perplexities: some of each come when the run is completed."""
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    for name in ("search.json", "evaluation/perplexity-dense.json"):
        (run / name).unlink()
    again = adapruner.prune(str(model_folder), str(text_file), output=run, **RUN_OPTIONS)
    assert again.result.models == finished.result.models
    assert (wandb.runs, wandb.told) == ([], [])


def note_modules(file: Path) -> None:
    file.write_text("\n".join(sys.modules))


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    """In a process that has imported all that runs need, and nothing for other tests."""
    process = fast_starts().Process(target=note_modules, args=(tmp_path / "modules",))
    process.start()
    process.join()
    modules = set((tmp_path / "modules").read_text().split())
    assert {"adapruner.tracking", "adapruner.recovery._training", "accelerate", "transformers.trainer"} <= modules
    assert not {"wandb", "mlflow", "trackio", "tensorboard"} & modules


def test_a_missing_package_is_refused_before_any_work(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaPrunerError, match="`track` mlflow needs its package: pip install mlflow"):
        adapruner.prune(str(model_folder), str(text_file), output=tmp_path / "run", track="mlflow")
    with pytest.raises(AdaPrunerError, match="`track` mlflow needs"):
        adapruner.recover(model_folder, str(text_file), tmp_path / "better", track="mlflow")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_is_named_once_and_harms_nothing(wandb: type[Noting], tmp_path: Path) -> None:
    wandb.fails_at = 1
    notes: list[str] = []
    with Tracking("wandb", tmp_path / "run", notes.append) as tracking:
        for _ in range(3):
            tracking.on_numbers({"a@b": 1})
    assert wandb.told == [({"a-b": 1.0}, 0)]
    assert notes == ["wandb failed and gets no further numbers: no network"]


def test_a_tracker_that_cannot_begin_is_an_error_of_one_line(
    wandb: type[Noting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Noting) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(wandb, "start", start)
    with (
        pytest.raises(AdaPrunerError, match="`track` wandb cannot begin a run: not logged in"),
        Tracking("wandb", tmp_path, lambda note: None),
    ):
        pytest.fail("begun")


def test_tensorboard_gets_curves(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Tracking("tensorboard", tmp_path, pytest.fail) as tracking:
        for value in (3.0, 2.0):
            tracking.on_numbers({"trials/loss": value})
    [file] = (tmp_path / "tensorboard").rglob("events*")
    events = reader.EventAccumulator(str(file.parent)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("trials/loss")] == [(0, 3.0), (1, 2.0)]

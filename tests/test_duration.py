"""The predicted duration of a run: what is counted against what the stages do, and what a person is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adapruner
from adapruner.graph import Making
from adapruner.run import api, duration
from conftest import tiny_model
from run_helpers import RUN_OPTIONS, interrupt_before

OPTIONS: dict[str, Any] = RUN_OPTIONS | {
    "objective_windows": 24,
    "final_windows": 8,
    "tune_scales": True,
    "compensation_windows": 96,
    "level_rounds": 1,
    "recover": "self",
    "recovery": {"steps": 4, "batch_size": 16, "seq_len": 16, "records": 32},
}


def tokens_of(work: list[duration.Work]) -> Counter[str]:
    """By stage, the tokens that pass through all layers of the dense model, or as many parameters."""
    tokens = Counter[str]()
    for stage, kind, count in work:
        tokens[stage] += round(count) if kind in ("layers", "evaluated", "written", "measured", "learnt") else 0
    return +tokens


class Passes(adapruner.Callback):
    """Counts the tokens in forward passes through all layers of the dense model, stage by stage, by running along."""

    def __init__(self) -> None:
        self.tokens, self.stages = Counter[str](), ["before"]
        dense = tiny_model()
        self._parameters = sum(weight.numel() for weight in dense.model.layers.parameters())

    def on_stage_begin(self, stage: str) -> None:
        self.stages.append(stage)

    def on_stage_end(self, stage: str, cost: Any) -> None:
        assert self.stages.pop() == stage

    def note(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        # A layer with another forward is skipped, or its arguments are noted.
        if type(module).__name__ != "LlamaDecoderLayer" or "forward" in vars(module):
            return
        hidden = output[0] if isinstance(output, tuple) else output
        weights = sum(
            weight.numel() for name, weight in module.named_parameters() if "lora_" not in name and "ia3_" not in name
        )
        self.tokens[self.stages[-1]] += hidden.shape[:-1].numel() * weights / self._parameters


@pytest.fixture
def passes() -> Iterator[Passes]:
    passes = Passes()
    with torch.nn.modules.module.register_module_forward_hook(passes.note):
        yield passes


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[duration.Work]:
    """The work that a run counts before it starts; nothing is timed."""
    work: list[duration.Work] = []

    def count(makings: list[Making]) -> dict[str, float]:
        work.extend(duration.missing_work(makings))
        return {}

    monkeypatch.setattr(api, "expected_seconds", count)
    return work


def test_counts_the_forward_passes_of_every_stage(
    prune: Callable[..., adapruner.PruneResult], passes: Passes, counted: list[duration.Work]
) -> None:
    prune(**OPTIONS, callbacks=[passes])

    expected, true = tokens_of(counted), passes.tokens
    print({stage: (round(expected[stage]), round(true[stage])) for stage in expected | true})
    for stage, tolerance in {
        "writing text": 0.02,
        "reading activations": 0.05,
        "measuring": 0.02,
        "removing parts whole": 0.1,
        "compensating": 0.1,
        "tuning scales": 0.1,
        "recovering": 0.1,
        "evaluating": 0.05,
        # How much of these is done depends on what they find.
        "searching": 0.4,
        "levelling widths": 0.4,
        "looking for breakage": 0.3,
    }.items():
        assert expected[stage] == pytest.approx(true[stage], rel=tolerance), stage
    assert sum(expected.values()) == pytest.approx(sum(true.values()), rel=0.15)


def test_of_a_run_that_is_resumed_only_missing_stages_count(
    prune: Callable[..., adapruner.PruneResult],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    counted: list[duration.Work],
) -> None:
    options = OPTIONS | {"recover": None, "recovery": {}, "calibration": str(text_file)}
    interrupt_before("compensating", model_folder, tmp_path / "run", **options)
    first = {stage for stage, *_ in counted}
    assert {"measuring", "searching", "levelling widths", "compensating", "tuning scales", "evaluating"} <= first
    counted.clear()

    prune(**options)
    assert {stage for stage, *_ in counted} == first - {
        "writing text",
        "reading activations",
        "measuring",
        "comparing removals",
        "removing parts whole",
        "searching",
        "levelling widths",
    }
    counted.clear()

    prune(**options)
    assert not counted


class _AfterTrials(adapruner.Callback):
    def __init__(self, trials: int) -> None:
        self.left = trials

    def on_trial(self, trial: Any) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("killed")


def test_finished_trials_of_a_search_do_not_count(
    prune: Callable[..., adapruner.PruneResult], counted: list[duration.Work]
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        prune(**RUN_OPTIONS, callbacks=[_AfterTrials(6)])
    before = tokens_of(counted)["searching"]
    counted.clear()

    prune(**RUN_OPTIONS)
    assert 0 < tokens_of(counted)["searching"] < before


def test_ratios_share_what_is_measured(
    model_folder: Path, text_file: Path, tmp_path: Path, counted: list[duration.Work]
) -> None:
    options = RUN_OPTIONS | {"ratio": (0.1, 0.2), "calibration": str(text_file)}
    with pytest.raises(KeyboardInterrupt):
        adapruner.prune_ratios(str(model_folder), output=tmp_path / "run", callbacks=[_Stopping()], **options)
    kinds = Counter((stage, kind) for stage, kind, _ in counted)
    assert kinds["measuring", "measured"] == 1
    assert kinds["searching", "solved"] == 2


class _Stopping(adapruner.Callback):
    def __init__(self, last: str = "") -> None:
        self.last = last

    def on_stage_begin(self, stage: str) -> None:
        if stage == self.last or not self.last:
            raise KeyboardInterrupt


def test_every_kind_of_work_is_timed(
    prune: Callable[..., adapruner.PruneResult], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[dict[str, float]] = []
    predict = duration.expected_seconds

    def note(makings: list[Making]) -> dict[str, float]:
        state = torch.get_rng_state()
        said.append(predict(makings))
        assert torch.equal(torch.get_rng_state(), state)
        return {"searching": 600.0}

    monkeypatch.setattr(api, "expected_seconds", note)
    with pytest.raises(KeyboardInterrupt):
        prune(
            **OPTIONS | {"recovery": {"minutes": 0.1, "seq_len": 16, "records": 32}},
            callbacks=[_Stopping("checking text")],
        )

    assert "about 10 minutes on this machine: searching 10\n" in capfd.readouterr().err
    (seconds,) = said
    assert seconds.pop("recovering") == pytest.approx(6.0)
    stages = {"writing text", "measuring", "searching", "levelling widths", "tuning scales"}
    assert stages <= seconds.keys()
    assert all(0 < amount < 60 for amount in seconds.values())


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ({}, ""),
        ({"measuring": 0.2}, ""),
        ({"measuring": 3.0, "searching": 81.4}, "about 84 seconds on this machine: measuring 3, searching 81"),
        ({"measuring": 20.0, "searching": 6000}, "about 100 minutes on this machine: searching 100"),
        (
            {"searching": 9000, "tuning scales": 5400},
            "about 4.0 hours on this machine: searching 2.5, tuning scales 1.5",
        ),
    ],
)
def test_the_line_says_what_takes_long(seconds: dict[str, float], line: str) -> None:
    assert duration.described(seconds) == line


def test_layer_by_layer_nothing_is_predicted(
    prune: Callable[..., adapruner.PruneResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, float]] = []
    predict = duration.expected_seconds
    monkeypatch.setattr(api, "expected_seconds", lambda makings: said.append(predict(makings)) or {})
    monkeypatch.setattr(duration, "time_work", None)
    with pytest.raises(KeyboardInterrupt):
        prune(**RUN_OPTIONS, layer_wise=True, callbacks=[_Stopping()])
    assert said == [{}]

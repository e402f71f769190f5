"""The whole job on a tiny model: what comes out, what is resumed after a kill, what is refused before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, PruneConfig, verbs
from adapruner.card import _what_was_removed, model_card
from adapruner.checkpoint import save_checkpoint
from adapruner.cli import main, with_options
from adapruner.evaluation import Breakage
from adapruner.files import replace
from adapruner.graph import RunFolder
from adapruner.graph.records import Record
from adapruner.models import find_model, load_model
from adapruner.planning import PruningPlan
from adapruner.recovery import RecoveryRecord
from adapruner.result import ModelNumbers, RunResult
from adapruner.search import Search
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from run_helpers import QUICK, WITH_TIMES, assert_same_artifacts, flags, run_killed
from run_helpers import RUN_OPTIONS as OPTIONS


def command(model: Path, output: Path, text: Path, **changes: object) -> list[str]:
    return ["prune", str(model), "-o", str(output), *flags(OPTIONS | {"calibration": str(text)} | changes)]


def run_cli(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def run(finished: adapruner.PruneResult, tmp_path: Path) -> Path:
    """A copy of the finished run, for another to take from it what is the same."""
    return Path(shutil.copytree(finished.output, tmp_path / "run"))


def test_the_result_is_a_smaller_model_with_its_numbers(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path
) -> None:
    pruned = adapruner.load(finished.model_folder)
    result = RunResult.model_validate_json((finished.output / "result.json").read_bytes())
    assert result == finished.result
    assert [model.role for model in result.models] == ["dense", "best_fixed", "searched"]
    assert result.final.parameters == sum(parameter.numel() for parameter in pruned.parameters())
    assert 0.095 <= result.removed_share <= 0.105
    assert result.plan_hash == finished.plan.hash == PruningPlan.load(finished.output / "plan.json").hash
    assert result.search.best_loss <= result.search.best_fixed_loss
    text = f"{text_file}@report"
    for folder, role in ((finished.model_folder, "searched"), (model_folder, "dense")):
        [evaluated] = adapruner.evaluate(folder, [text], seq_len=16).perplexity
        assert evaluated.perplexity == result.model(role).perplexity[text].perplexity
    assert set(result.stages) == {
        "loading",
        "reading activations",
        "measuring",
        "comparing removals",
        "levelling widths",
        "writing text",
        "looking for breakage",
        "removing parts whole",
        "searching",
        "cutting",
        "compensating",
        "saving",
        "evaluating",
    }


def test_the_run_folder_holds_what_the_design_says(finished: adapruner.PruneResult) -> None:
    assert {path.name for path in finished.output.iterdir()} - {".lock"} == {
        "config.yaml",
        "keys",
        "windows.safetensors",
        "self.safetensors",
        "statistics.safetensors",
        "moments",
        "whole.json",
        "study.jsonl",
        "search.json",
        "levelled.json",
        "plan.json",
        "model",
        "evaluation",
        "result.json",
        "report.html",
        "log.jsonl",
    }
    perplexities = {f"perplexity-{role}.json" for role in ("dense", "best_fixed", "searched")}
    breakage = {f"breakage-{role}.json" for role in ("dense", "searched")} | {"continuations.safetensors"}
    assert {path.name for path in (finished.output / "evaluation").iterdir()} == perplexities | breakage | {
        "texts.safetensors"
    }


def test_the_same_call_again_does_nothing_twice(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("adapruner.run.nodes.inputs.load_model")
    monkeypatch.delattr("adapruner.graph.making.replace")
    again = adapruner.prune(str(model_folder), output=finished.output, calibration=str(text_file), **OPTIONS)
    assert (again.plan, again.result) == (finished.plan, finished.result)


def test_another_seed_is_another_plan(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """That the same seed gives the same plan is tested with every kill."""
    other = adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), seed=1, **OPTIONS)
    assert other.plan.hash != finished.plan.hash


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    arguments = command(model_folder, run, text_file)
    for target, name, calls, left in (
        # Three of eight blocks; then the other five, and two of three parts of the pool.
        ("adapruner.run.nodes.measured", "write_atomically", 3, "unfinished/moments-*/0002.safetensors"),
        (
            "adapruner.run.nodes.measured",
            "write_atomically",
            7,
            "unfinished/statistics.safetensors-*/000004.safetensors",
        ),
        ("adapruner.search.Objective", "__call__", 6, "study.jsonl"),
        ("adapruner.checkpoint._folder", "_add_older_keys", 0, "unfinished/model-*/**/model.safetensors"),
    ):
        run_killed(target, name, calls, arguments, tmp_path)
        assert list(run.glob(left)), name
        assert not (run / "result.json").exists()
    capsys.readouterr()
    assert run_cli([*arguments, "--json"]) == 0
    completed = capsys.readouterr()
    assert json.loads(completed.out)["plan_hash"] == finished.plan.hash
    assert_same_artifacts(run, finished.output)
    # In a log: one line per stage, no bars; and advice. Nothing that was finished is done twice.
    assert "\r" not in completed.err
    stages = [line for line in completed.err.splitlines() if not line.startswith("advice: ")]
    assert all("done in" in line for line in stages)
    named = dict.fromkeys(line.partition(":")[0] for line in stages)
    assert list(named) == ["loading", "cutting", "compensating", "saving", "evaluating", "looking for breakage"]


def test_what_a_kill_at_the_edge_of_any_artifact_leaves_is_resumed_from(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk there is what a kill leaves: before an artifact, when it is saved beside its place, and when
    it is in its place and not yet known as whole. The artifact is then made from it as in the undisturbed run."""
    run, left = tmp_path / "run", []

    def leave(*_: object) -> None:
        left.append(tmp_path / f"{len(left):03}")
        shutil.copytree(run, left[-1])

    def leaving_before(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (leave(), function(*arguments))[1]

    names: list[str] = []
    finish = RunFolder.finish

    def noting(self: RunFolder, name: str, record: Record, *beside: Any) -> None:
        names.append(name)
        finish(self, name, record, *beside)

    options = QUICK | {"calibration": str(text_file), "level_rounds": 1, "self_windows": 4}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "begin", leaving_before(RunFolder.begin))
        patch.setattr(RunFolder, "finish", leaving_before(noting))
        patch.setattr("adapruner.graph.making.replace", leaving_before(replace))
        adapruner.prune(str(model_folder), output=run, **options)
    assert len(left) == 3 * len(names) == 54

    def stopping(self: RunFolder, name: str, record: Record, *beside: Any) -> None:
        finish(self, name, record, *beside)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "finish", stopping)
    for number, folder in enumerate(left):
        name = names[number // 3]
        assert list(folder.glob(f".{name}.partial" if number % 3 == 1 and "/" not in name else "config.yaml"))
        with pytest.raises(KeyboardInterrupt):
            adapruner.prune(str(model_folder), output=folder, **options)
        resumed, undisturbed = (RunFolder(one).record(name) for one in (folder, run))
        assert resumed is not None
        assert undisturbed is not None
        assert (resumed.key, bool(resumed.files)) == (undisturbed.key, True), (name, number)
        assert name in WITH_TIMES or resumed == undisturbed, (name, number)
        assert not list(folder.glob("unfinished/*"))


def test_plan_gives_another_ratio_without_measuring_or_searching(
    run: Path, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Widths are levelled at each ratio: without that, more is removed of the same.
    earlier = adapruner.prune(
        str(model_folder), output=run, calibration=str(text_file), level_rounds=0, overwrite=True, **OPTIONS
    )
    for name in (
        "_windows.generate_windows",
        "_statistics.measure_in_parts",
        "_statistics.measure_moments",
        "_search.Search",
    ):
        monkeypatch.delattr(f"adapruner.procedure.{name}")
    other = tmp_path / "b"
    assert run_cli(["plan", str(earlier.output), "--ratio", "0.05", "-o", str(other)]) == 0
    plan = PruningPlan.load(other / "plan.json")
    assert abs(plan.ratio - 0.05) <= 0.005
    for smaller, larger in zip(earlier.plan.blocks, plan.blocks, strict=True):
        assert set(smaller.kept) <= set(larger.kept)
    dense = "evaluation/perplexity-dense.json"
    assert RunFolder(other).record(dense) == RunFolder(earlier.output).record(dense)


def test_the_model_can_write_its_own_calibration_text(model_folder: Path, tmp_path: Path) -> None:
    """That it writes the same each time is tested with every kill, and layer by layer."""
    options = QUICK | {"calibration": "self"}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    # There is no text to report on.
    assert not result.result.final.perplexity


@pytest.mark.parametrize(("space", "alignment"), [("paper", "data"), ("paper", "paper"), ("extended", "data")])
@pytest.mark.parametrize("search", ["calibration", "metric"])
def test_parts_of_the_space_can_be_searched_alone(
    space: str, alignment: str, search: str, run: Path, model_folder: Path, text_file: Path
) -> None:
    options = OPTIONS | {"alignment": alignment, "search": search, "trials": 6, "space": space, "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options).result
    best, fixed = result.search.best, result.search.best_fixed
    assert best.budget == fixed.budget
    if search == "calibration":
        assert best.point == fixed.point
    else:
        assert best.samples == fixed.samples


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "paper", "compensation": "none"},
        {"space": "paper", "protect_first": None, "protect_last": None},
        {"layout": "uniform", "protect_first": None, "protect_last": None, "selection": "kl"},
        {"compensation": "least-squares-bias", "final_windows": 0},
        {"compensation": "bias", "head_share": 0.5},
    ],
    ids=["paper", "paper compensated", "uniform", "least squares with bias", "bias"],
)
def test_other_ways(changes: dict[str, object], model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Every mode ends in a model that loads, meets the ratio, and has been found by a search of that mode."""
    options = QUICK | {"trials": 12, "ratio": 0.12} | changes
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **options)
    assert abs(result.plan.ratio - 0.12) <= 0.005
    assert (tmp_path / "run" / "moments").is_dir() == (options.get("compensation") != "none")
    model = adapruner.load(result.model_folder)
    dense = adapruner.load(model_folder)
    if options.get("layout") == "uniform":
        assert type(model) is type(dense)
        assert len({(block.kind, len(block.kept)) for block in result.plan.blocks}) == 2


def test_the_final_fit_brings_the_model_nearer_to_the_dense_one(
    run: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"calibration": str(text_file), "ratio": 0.15, "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, sequential=False, **options)
    tokens = load_file(run / "windows.safetensors")["compensation"]
    dense = adapruner.load(model_folder)
    with torch.no_grad():
        wanted = dense(tokens).logits
        plain = prune_model(dense, build_structure(dense), result.plan)(tokens).logits
        one_shot = adapruner.load(result.model_folder)(tokens).logits
    # Nothing before the model depends on it.
    for name in ("_statistics.measure_in_parts", "_statistics.measure_moments", "_search.Search"):
        monkeypatch.delattr(f"adapruner.procedure.{name}")
    again = adapruner.prune(str(model_folder), output=run, sequential=True, **options)
    assert again.plan == result.plan
    with torch.no_grad():
        sequential = adapruner.load(again.model_folder)(tokens).logits
    errors = [float((logits - wanted).norm()) for logits in (plain, one_shot, sequential)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("final_windows", [30, 500])
def test_the_windows_of_a_trial_are_as_many_as_the_text_has(
    final_windows: int, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = QUICK | {"objective_windows": None, "final_windows": final_windows, "seq_len": 5, "compensation": "none"}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **options).result
    there = len(load_file(tmp_path / "run" / "windows.safetensors")["objective"])
    assert 94 < there < 190  # fewer than both would take, more than are needed
    scored = {30: there - 30, 500: 64}[final_windows]
    assert max(point.windows for point in result.search.points) == scored
    assert result.search.steps[0].windows == there - scored
    assert f"Judged on {scored} windows of 5 tokens" in (tmp_path / "run" / "report.html").read_text("utf-8")
    with pytest.raises(AdaPrunerError, match="windows, 64 are needed"):
        adapruner.prune(
            str(model_folder), output=tmp_path / "other", calibration=str(text_file), **options | {"seq_len": 16}
        )


def test_query_heads_end_to_end(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = QUICK | {"head_granularity": "query-head", "head_share": 1.0}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **options)
    assert any(len(block.kept) < block.groups for block in result.plan.blocks if block.kind == "heads")
    assert adapruner.evaluate(result.model_folder, [str(text_file)], seq_len=16, limit=3).perplexity[0].windows == 3
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    assert adapruner.load(result.model_folder).generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_json_on_stdout(verb: str, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--evaluate", str(text_file), "--seq-len", "16", "--limit", "5"] if verb == "evaluate" else []
    assert run_cli([verb, str(model_folder), "--json", *extra]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == str(model_folder)
    if verb == "evaluate":
        assert content["perplexity"][0]["windows"] == 5
    else:
        assert content["parameters"] == sum(p.numel() for p in adapruner.load(model_folder).parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0}, "--ratio 0 is not a fraction between 0 and 1"),
        ({"ratio": 1}, "--ratio 1 is not a fraction between 0 and 1"),
        ({"ratio": -0.1}, "--ratio -0.1 is not a fraction between 0 and 1"),
        ({"ratio": "much"}, "--ratio much is not a number"),
        ({"ratio": 0.95}, "0.95 cannot be reached: with the first 1 and the last 1 of 4 layers protected, at most 0."),
        ({"layout": "uniform"}, "--layout uniform prunes all layers alike: remove --protect-first"),
        ({"alignment": "paper"}, "--alignment paper only knows the Taylor terms: set --space paper"),
        ({"compensation": "bias", "sequential": True}, "--sequential needs --compensation least-squares, not bias"),
        ({"samples": 13}, "--samples 13 is more than the 12 of --pool"),
        ({"pool": 5000}, "the text is too short: "),
        ({"objective_windows": 5000}, "the text is too short: "),
        ({"seq_len": 21}, "0 of "),
        ({"calibration": "wikitex2"}, "Did you mean 'wikitext2'"),
        ({"evaluate": "nowhere.txt"}, "there is no file "),
        ({"protect_first": 4}, "all 4 layers are protected"),
        ({"trails": 3}, "Unknown option: --trails"),
        ({"dtype": "int8"}, "--dtype"),
        ({"device": "gpu"}, "--device gpu: "),
    ],
)
def test_bad_options_are_one_line_before_any_work(
    changes: dict[str, object],
    message: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(command(model_folder, tmp_path / "run", text_file, **changes), message, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("calibration", "evaluate", "message"),
    [
        ("@calibration", "", "--objective would read"),
        ("", "@objective", "--evaluate would read"),
        ("", "@calibration", "--evaluate would read"),
    ],
)
def test_text_is_not_used_twice(
    calibration: str,
    evaluate: str,
    message: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = {"calibration": f"{text_file}{calibration}", "evaluate": f"{text_file}{evaluate}"}
    refuse(command(model_folder, tmp_path / "run", text_file, **texts), message, monkeypatch, capsys)


def refuse(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with code 2 and one line, and loads no weights."""
    with monkeypatch.context() as patch:
        patch.setattr("adapruner.run.nodes.inputs.load_model", lambda *_: pytest.fail("weights were loaded"))
        assert run_cli(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert captured.out == ""


def test_bad_models(
    text_file: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mistral3"}')
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}'
    )
    for model, message in (
        ("empty", "holds no model: it has no config.json"),
        ("other", "no causal language model 'mistral3'; did you mean 'mistral'?"),
        ("encoder", "'t5' is an encoder-decoder"),
        ("broken", "cannot load"),
        ("quantized", "this model is quantized"),
        ("missing", "no model at"),
        ("missing.gguf", "there is no GGUF file at"),
    ):
        refuse(command(tmp_path / model, tmp_path / "run", text_file), message, monkeypatch, capsys)
    message = "cannot load 'nobody/nothing'"
    refuse(command(Path("nobody/nothing"), tmp_path / "run", text_file), message, monkeypatch, capsys)


def test_bad_outputs(
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for output, message in (
        (tmp_path / "file", "exists and holds no run"),
        (tmp_path / "file" / "below", "cannot write to"),
        (tmp_path / "full", "exists and holds no run"),
    ):
        refuse(command(model_folder, output, text_file), message, monkeypatch, capsys)
    other = command(model_folder, finished.output, text_file, ratio=0.05)
    refuse(other, "holds a run of another configuration (ratio 0.1 → 0.05)", monkeypatch, capsys)
    unsearched = tmp_path / "unsearched"
    shutil.copytree(finished.output, unsearched)
    (unsearched / "search.json").unlink()
    for source, message in ((tmp_path, "holds no run"), (unsearched, "has no finished search")):
        arguments = ["plan", str(source), "--ratio", "0.05", "-o", str(tmp_path / "b")]
        refuse(arguments, message, monkeypatch, capsys)
    assert not (tmp_path / "b").exists()
    onto_itself = ["plan", str(finished.output), "--ratio", "0.05", "-o", str(finished.output), "--overwrite"]
    refuse(onto_itself, "is the earlier run itself", monkeypatch, capsys)
    assert adapruner.load(finished.model_folder)


@pytest.mark.parametrize("option", [("--seq-len", "1"), ("--limit", "0"), ("--dtype", "int8"), ("--device", "gpu")])
def test_bad_options_of_evaluate(
    option: tuple[str, str],
    model_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["evaluate", str(model_folder), "--evaluate", str(text_file), *option]
    refuse(arguments, option[1], monkeypatch, capsys)


def test_another_ratio_in_the_same_folder_and_back(
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished.output, tmp_path / "run")
    for name in ("_statistics.measure_in_parts", "_statistics.measure_moments"):
        monkeypatch.delattr(f"adapruner.procedure.{name}")
    options = OPTIONS | {"calibration": str(text_file), "overwrite": True}
    other = adapruner.prune(str(model_folder), output=tmp_path / "run", **options | {"ratio": 0.05})
    assert other.plan.ratio < 0.06
    assert other.result.search.ratio == 0.05
    # The trials of before are known: none is run again.
    monkeypatch.delattr(Search, "_run_trial")
    adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert_same_artifacts(tmp_path / "run", finished.output)


def test_a_pruned_model_is_not_loaded_from_pickled_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((model_folder / name).read_text())
    torch.save(adapruner.load(model_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(AdaPrunerError, match="safetensors"):
        load_model(find_model(str(folder)))


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = PruneConfig.from_options(model="smollm2", evaluate=("a", "b"), evaluate_windows=3)
    config.save(tmp_path / "config.yaml")
    assert PruneConfig.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("- a\n- list\n")
    with pytest.raises(AdaPrunerError, match="is not the config of a run"):
        PruneConfig.load(tmp_path / "config.yaml")


def test_the_model_card_says_what_the_result_says(finished: adapruner.PruneResult, text_file: Path) -> None:
    card = ModelCard.load(finished.model_folder / "README.md")
    result = finished.result
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert card.data.base_model is None  # a local folder is no address on the hub
    perplexities = [result.model(role).perplexity[f"{text_file}@report"].perplexity for role in ("dense", "searched")]
    assert card.data.eval_results[0].metric_value == round(perplexities[1], 3)
    assert re.search(r"\| {:.2f} ± [\d.]+ \| {:.2f} ± [\d.]+ \|".format(*perplexities), card.text)
    assert result.plan_hash[:12] in card.text
    assert "trust_remote_code=True" in card.text
    kept = [block for block in finished.plan.blocks if block.layer == 0]
    assert f"| 0 | {' | '.join(f'{len(block.kept)} of {block.groups}' for block in kept)} |" in card.text


@pytest.mark.parametrize(
    ("kept", "named"),
    [
        ({"heads": [4, 4], "channels": [8, 5]}, "feed-forward channels"),
        ({"heads": [4, 0], "channels": [8, 5]}, "whole attentions, feed-forward channels"),
        ({"heads": [4, 2], "channels": [8, 8]}, "attention heads"),
        (
            {"heads": [0, 2], "channels": [0, 5]},
            "attention heads, whole attentions, feed-forward channels, whole feed-forwards",
        ),
        ({"heads": [4, 4], "experts": [6, 6]}, "experts"),
    ],
)
def test_the_model_card_names_what_was_removed(kept: dict[str, list[int]], named: str) -> None:
    groups = {"heads": 4, "channels": 8, "experts": 8}
    blocks = [
        SimpleNamespace(kind=kind, groups=groups[kind], kept=range(count)) for kind in kept for count in kept[kind]
    ]
    assert _what_was_removed(SimpleNamespace(blocks=blocks), SimpleNamespace(vocabulary=None)) == named


def test_the_licence_of_the_base_model_is_carried_over(
    model_folder: Path, finished: adapruner.PruneResult, tmp_path: Path
) -> None:
    base = tmp_path / "base <b>|`x`"
    shutil.copytree(model_folder, base)
    config = finished.result.config.model_copy(update={"model": str(base)})
    result = finished.result.model_copy(update={"config": config})
    for readme, expected in (
        ("---\nlicense: mit\n---\nA model.\n", ("mit", None)),
        ("---\nlicense: other\nlicense_name: some\n---\nA model.\n", ("other", "some")),
        ("---\ntitle: a: b: c\n---\nA model.\n", ("other", None)),
    ):
        (base / "README.md").write_text(readme)
        text = model_card(find_model(str(base)), adapruner.load(finished.model_folder).config, finished.plan, result)
        data = ModelCard(text).data
        assert (data.license, getattr(data, "license_name", None)) == expected
        assert str(tmp_path) not in text
        body = text.split("---", 2)[2]
        assert "<b>" not in body
        assert "&lt;b&gt;&#124;&#96;x&#96;" in body


def test_a_model_is_exported(
    finished: adapruner.PruneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stock model"
    assert run_cli(["export", str(finished.model_folder), "--to", "stock", "-o", str(folder), "--json"]) == 0
    completed = capsys.readouterr()
    printed = json.loads(completed.out)
    assert printed["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert re.search(r"padding with zeros: [\d.]+ MB of weights became [\d.]+ MB", completed.err)
    tokens = torch.arange(3, 19).view(1, -1)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        torch.testing.assert_close(stock, adapruner.load(finished.model_folder)(tokens).logits, rtol=1e-4, atol=1e-4)
    before, after = ((path / "README.md").read_text() for path in (finished.model_folder, folder))
    assert "trust_remote_code" in before
    assert "trust_remote_code" not in after
    assert before.partition("## Loading")[0] == after.partition("## Loading")[0]
    assert before.partition("## Licence")[2] == after.partition("## Licence")[2]


def test_exports_that_are_refused(
    finished: adapruner.PruneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, there = str(finished.model_folder), tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for arguments, message in (
        (["--to", "stock", "-o", str(there)], "exists"),
        (["--to", "stock", "-o", str(there), "--overwrite"], "holds something else than what adapruner wrote"),
        (["--to", "gguf", "-o", str(there), "--overwrite"], "no file"),
        (["--to", "gguf", "-o", str(tmp_path / "model.gguf")], "llama"),  # biases and a vocabulary of words
        (["--to", "onnx", "-o", str(tmp_path / "model.onnx")], "onnx"),
        (["--to", "stock", "-o", str(tmp_path / "a"), "--push-to-hub", "no//name"], "--push-to-hub"),
    ):
        assert run_cli(["export", model, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in there.iterdir()] == ["notes.txt"]


def test_uploading(finished: adapruner.PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked who is there before any work, and gets the whole folder."""
    calls = []
    for name in ("whoami", "create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **options: calls.append((name, options)))
    verbs.export(finished.model_folder, "stock", tmp_path / "stock", push_to_hub="me/small")
    assert [name for name, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[-1][1] == {
        "repo_id": "me/small",
        "folder_path": tmp_path / "stock",
        "revision": None,
    }


def test_layer_by_layer_leads_to_the_same_model(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """With everything in one dtype, and by a text that the model writes itself. It is what a run is told to do where
    memory gives out, and decides last digits: it is not mixed with what was made otherwise."""
    run, texts = tmp_path / "run", {"calibration": "self", "objective": str(text_file)}
    options = QUICK | texts | {"dtype": "bfloat16", "self_windows": None}
    resident = adapruner.prune(str(model_folder), output=run, layer_wise=False, **options)
    with pytest.raises(
        AdaPrunerError, match=r"layer_wise\): windows.safetensors, self.safetensors, .* would be rebuilt"
    ):
        adapruner.prune(str(model_folder), output=run, layer_wise=True, **options)
    result = adapruner.prune(str(model_folder), output=run, overwrite=True, layer_wise=True, **options)
    assert PruneConfig.load(run / "config.yaml").layer_wise
    assert result.plan.hash == resident.plan.hash
    assert result.result.search.best_loss == pytest.approx(resident.result.search.best_loss, rel=1e-3)
    with pytest.raises(AdaPrunerError, match=r"with all layers in memory, and .* did not have them"):
        adapruner.plan_again(run, tmp_path / "faster", target_speed=1.2)


def test_vector_wise_terms_alone(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The best fixed metric is then the one that needs no gradient of a weight."""
    result = adapruner.prune(
        str(model_folder), output=tmp_path, calibration=str(text_file), terms="vector-wise", **QUICK | {"trials": 6}
    )
    assert result.result.search.best_fixed_name == "vectorize"
    assert "element_absolute" not in load_file(tmp_path / "statistics.safetensors")


def test_a_pruned_model_is_pruned_again(finished: adapruner.PruneResult, text_file: Path, tmp_path: Path) -> None:
    again = adapruner.prune(str(finished.model_folder), output=tmp_path, calibration=str(text_file), **QUICK)
    assert again.result.model("dense").parameters == finished.result.final.parameters
    assert 0.095 <= again.result.removed_share <= 0.105
    with pytest.raises(AdaPrunerError, match="whose layers differ already cannot be estimated"):
        verbs.estimate(finished.model_folder, **OPTIONS)


def test_quiet_leaves_results_and_advice(
    finished: adapruner.PruneResult, run: Path, model_folder: Path, text_file: Path
) -> None:
    """Of a process of its own, which completes a run from the search on."""
    for path in (run / "search.json", run / "study.jsonl", run / "plan.json"):
        path.unlink()
    for path in (run / "model", run / "evaluation"):
        shutil.rmtree(path)
    arguments = [*command(model_folder, run, text_file), "--quiet", "--json"]
    environment = os.environ | {"FORCE_COLOR": "1", "NO_COLOR": "1"}
    process = subprocess.run([sys.executable, "-m", "adapruner", *arguments], capture_output=True, env=environment)
    assert json.loads(process.stdout)["plan_hash"] == finished.plan.hash
    assert finished.advice()
    assert process.stderr.decode().splitlines() == [f"advice: {with_options(line)}" for line in finished.advice()]


def test_advice_names_what_should_not_go_unseen(
    finished: adapruner.PruneResult, text_file: Path, tmp_path: Path
) -> None:
    known = finished.result.final.perplexity[f"{text_file}@report"]
    trained = RecoveryRecord.model_construct()

    def advice(dense: float = 20, final: float = 30, compensation: int = 768, widths: int = 24, **changes: Any) -> str:
        blocks = [block.model_copy(update={"kept": tuple(range(widths))}) for block in finished.plan.blocks]
        models = [
            ModelNumbers(role=role, parameters=1, perplexity={"text": known.model_copy(update={"perplexity": value})})
            for role, value in (("dense", dense), ("recovered" if "recovery" in changes else "searched", final))
        ]
        changes |= {"models": tuple(models), "windows": {"compensation": compensation}}
        point = finished.result.search.points[0].model_copy(update={"starting_point": False})
        changes["search"] = finished.result.search.model_copy(update={"points": (point,)})
        return " | ".join(
            adapruner.PruneResult(
                tmp_path,
                finished.plan.model_copy(update={"blocks": tuple(blocks)}),
                finished.result.model_copy(update=changes),
            ).advice()
        )

    def broken(repetition: float, bits: float) -> str:
        def of(role: Any, repetition: float, bits: float) -> ModelNumbers:
            text = known.model_copy(update={"perplexity": 2**bits, "predicted_bytes": known.predicted_tokens})
            return ModelNumbers(role=role, parameters=1, breakage=Breakage(repetition=repetition, texts={"code": text}))

        models = (of("dense", 0.2, 1.0), of("searched", repetition, bits))
        result = finished.result.model_copy(update={"models": models})
        return " | ".join(adapruner.PruneResult(tmp_path, finished.plan, result).advice())

    assert "the model repeats itself: 50% of its greedy text was there before, 20% in" in broken(0.5, 1.0)
    assert "repeats" not in broken(0.4, 1.0)
    assert "bits per byte of code rose from 1.00 to 1.60 | fine-tuning" in broken(0.2, 1.6)
    assert broken(0.5, 1.6).count("a lower `ratio` helps") == 1
    assert "code" not in broken(0.2, 1.4)
    assert advice() == ""
    assert "rose from 20.0 to 50.0 | fine-tuning with `recover`" in advice(final=50)
    assert advice(final=30, recovery=trained) == ""
    assert "longer fine-tuning" in advice(final=45, recovery=trained)
    assert "rose from 20.0 to nan" in advice(final=float("nan"))
    assert "fitted on 40 windows" in advice(compensation=40)
    assert "not multiples of 8" in advice(widths=23)


def test_a_part_that_the_family_cannot_lose_is_refused_before_anything_is_made(
    make_model: Any, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    save_checkpoint(make_model("opt"), tokenizer, tmp_path / "opt")
    with pytest.raises(
        AdaPrunerError, match=r"`whole` feed-forward: .* opt cannot lose it; possible: attention, layer"
    ):
        adapruner.prune(
            str(tmp_path / "opt"),
            output=tmp_path / "run",
            calibration=str(text_file),
            **OPTIONS | {"whole": ["feed-forward"]},
        )
    assert not (tmp_path / "run").exists()

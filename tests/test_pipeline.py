"""The whole job on a tiny model: what comes out, what goes on after a kill, what is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, PruneConfig, verbs
from adapruner.checkpoint import model_card
from adapruner.cli import main
from adapruner.models import find_model, load_model
from adapruner.planning import PruningPlan
from adapruner.structure import build_structure
from adapruner.surgery import prune_model

OPTIONS = {
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


def command(model: Path, output: Path, text: Path, **changes: object) -> list[str]:
    options = OPTIONS | {"calibration": str(text), "evaluate": str(text)} | changes
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return ["prune", str(model), "-o", str(output), *flags]


def run_cli(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> adapruner.PruneResult:
    output = tmp_path_factory.mktemp("runs") / "a"
    return adapruner.prune(str(model_folder), output, calibration=str(text_file), evaluate=(str(text_file),), **OPTIONS)


def test_the_result_is_a_smaller_model_with_its_numbers(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path
) -> None:
    pruned = adapruner.load(finished.model_folder)
    result = json.loads((finished.output / "result.json").read_text())
    assert result == finished.result
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    assert after == sum(parameter.numel() for parameter in pruned.parameters())
    assert 0.095 <= 1 - after / before <= 0.105
    assert result["plan_hash"] == finished.plan.hash == PruningPlan.load(finished.output / "plan.json").hash
    assert result["search"]["best_loss"] <= result["search"]["best_fixed_loss"]
    text = f"{text_file}@report"
    evaluated = adapruner.evaluate(finished.model_folder, [text], window_length=16).perplexity
    assert evaluated[0].perplexity == result["perplexity"][text]["searched"]["perplexity"]
    dense = adapruner.evaluate(model_folder, [text], window_length=16).perplexity
    assert dense[0].perplexity == result["perplexity"][text]["dense"]["perplexity"]
    assert set(result["stages"]) == {
        "loading",
        "reading activations",
        "measuring",
        "comparing removals",
        "searching",
        "cutting",
        "compensating",
        "saving",
        "evaluating",
    }


def test_the_run_folder_holds_what_the_design_says(finished: adapruner.PruneResult) -> None:
    assert {path.name for path in finished.output.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "windows.safetensors",
        "statistics.safetensors",
        "moments",
        "study.journal",
        "study.json",
        "search.json",
        "plan.json",
        "model",
        "evaluation.json",
        "result.json",
        "report.html",
        "log.jsonl",
    }


def test_the_same_call_again_does_nothing_twice(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done already")

    for name in (
        "_measuring.load_model",
        "_measuring.measure_in_parts",
        "_choosing.Search",
        "_finishing.save_checkpoint",
    ):
        monkeypatch.setattr(f"adapruner.stages.{name}", fail)
    again = adapruner.prune(
        str(model_folder), finished.output, calibration=str(text_file), evaluate=(str(text_file),), **OPTIONS
    )
    assert (again.plan, again.result) == (finished.plan, finished.result)


def test_another_seed_is_another_run_and_the_same_seed_the_same_plan(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    hashes = [
        adapruner.prune(str(model_folder), tmp_path / f"{seed}", calibration=str(text_file), seed=seed, **OPTIONS)
        for seed in (0, 1)
    ]
    assert hashes[0].plan.hash == finished.plan.hash
    assert hashes[1].plan.hash != finished.plan.hash


KILL = """
import os, signal, sys
import adapruner.checkpoint, adapruner.run_folder, adapruner.search
from adapruner.cli import main

target, name, calls = {target}, "{name}", {calls}
original = getattr(target, name)

def counted(*arguments, **named):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)

setattr(target, name, counted)
main()
"""


@pytest.mark.parametrize(
    ("target", "name", "calls", "left"),
    [
        ("adapruner.run_folder.RunFolder", "save_moments", 3, "moments/0002.safetensors"),
        ("adapruner.run_folder.RunFolder", "save_part", 2, "statistics.parts/000004-4.safetensors"),
        ("adapruner.search.Objective", "__call__", 0, "study.journal"),
        ("adapruner.search.Objective", "__call__", 6, "study.journal"),
        ("adapruner.surgery._sequential", "solve_damped", 1, "plan.json"),
        ("adapruner.checkpoint._folder", "_complete_config", 0, "model.partial/model.safetensors"),
    ],
    ids=["reading activations", "measuring", "first trial", "searching", "compensating", "saving"],
)
def test_a_killed_run_goes_on_to_the_same_plan(
    target: str,
    name: str,
    calls: int,
    left: str,
    finished: adapruner.PruneResult,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = KILL.format(target=target, name=name, calls=calls)
    arguments = command(model_folder, tmp_path / "run", text_file)
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert (tmp_path / "run" / left).exists()
    assert not (tmp_path / "run" / "result.json").exists()
    capsys.readouterr()
    assert run_cli([*arguments, "--json"]) == 0
    completed = capsys.readouterr()
    assert json.loads(completed.out)["plan_hash"] == finished.plan.hash
    assert not [path for path in (tmp_path / "run").iterdir() if "part" in path.name or "lock" in path.name]
    # In a log: one line per stage, no bars; and advice.
    assert "\r" not in completed.err
    stages = [line for line in completed.err.splitlines() if not line.startswith("adapruner: ")]
    assert all("done in" in line for line in stages)
    assert "measuring: done" in completed.err or target != "adapruner.run_folder.RunFolder"


def test_plan_gives_another_ratio_without_measuring_or_searching(
    finished: adapruner.PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("adapruner.stages._measuring.measure_in_parts")
    monkeypatch.delattr("adapruner.stages._choosing.Search")
    assert run_cli(["plan", str(finished.output), "--ratio", "0.05", "-o", str(tmp_path / "b")]) == 0
    plan = PruningPlan.load(tmp_path / "b" / "plan.json")
    assert abs(plan.ratio - 0.05) <= 0.005
    for smaller, larger in zip(finished.plan.blocks, plan.blocks, strict=True):
        assert set(smaller.kept) <= set(larger.kept)


def test_the_model_can_write_its_own_calibration_text(model_folder: Path, tmp_path: Path) -> None:
    result = adapruner.prune(str(model_folder), tmp_path / "run", calibration="self", **OPTIONS)
    again = adapruner.prune(str(model_folder), tmp_path / "again", calibration="self", **OPTIONS)
    assert result.plan == again.plan


@pytest.mark.parametrize(("space", "alignment"), [("paper", "data"), ("paper", "paper"), ("extended", "data")])
@pytest.mark.parametrize("search", ["calibration", "metric"])
def test_parts_of_the_space_can_be_searched_alone(
    space: str, alignment: str, search: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"alignment": alignment, "search": search, "trials": 6, "space": space}
    result = adapruner.prune(str(model_folder), tmp_path / "run", calibration=str(text_file), **options).result
    best, fixed = result["search"]["best"], result["search"]["best_fixed"]
    assert best["budget"] == fixed["budget"]
    if search == "calibration":
        assert best["point"] == fixed["point"]
    else:
        assert best["samples"] == fixed["samples"]


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
    options = OPTIONS | {"trials": 12, "ratio": 0.12} | changes
    result = adapruner.prune(str(model_folder), tmp_path / "run", calibration=str(text_file), **options)
    assert abs(result.plan.ratio - 0.12) <= 0.005
    assert (tmp_path / "run" / "moments").is_dir() == (options.get("compensation") != "none")
    model = adapruner.load(result.model_folder)
    dense = adapruner.load(model_folder)
    if options.get("layout") == "uniform":
        assert type(model) is type(dense)
        assert len({(block.kind, len(block.kept)) for block in result.plan.blocks}) == 2


def test_the_final_fit_brings_the_model_nearer_to_the_dense_one(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"calibration": str(text_file), "ratio": 0.15}
    results = [
        adapruner.prune(str(model_folder), tmp_path / name, sequential=name == "sequential", **options)
        for name in ("one-shot", "sequential")
    ]
    assert results[0].plan == results[1].plan
    tokens = load_file(tmp_path / "sequential" / "windows.safetensors")["compensation"]
    dense = adapruner.load(model_folder)
    with torch.no_grad():
        wanted = dense(tokens).logits
        plain = prune_model(dense, build_structure(dense), results[0].plan)(tokens).logits
        one_shot, sequential = (adapruner.load(result.model_folder)(tokens).logits for result in results)
    errors = [float((logits - wanted).norm()) for logits in (plain, one_shot, sequential)]
    assert errors[0] > errors[1] > errors[2]


def test_query_heads_end_to_end(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"head_granularity": "query-head", "head_share": 1.0}
    result = adapruner.prune(str(model_folder), tmp_path / "run", calibration=str(text_file), **options)
    assert any(len(block.kept) < block.groups for block in result.plan.blocks if block.kind == "heads")
    assert (
        adapruner.evaluate(result.model_folder, [str(text_file)], window_length=16, limit=3).perplexity[0].windows == 3
    )
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    assert adapruner.load(result.model_folder).generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_json_on_stdout(verb: str, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--perplexity", str(text_file), "--seq-len", "16", "--limit", "5"] if verb == "evaluate" else []
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
        ({"ratio": 0}, "--ratio 0: Input should be greater than 0"),
        ({"ratio": 1}, "--ratio 1: Input should be less than 1"),
        ({"ratio": -0.1}, "--ratio -0.1: Input should be greater than 0"),
        ({"ratio": "much"}, "--ratio much: Input should be a valid number"),
        ({"ratio": 0.95}, "0.95 cannot be reached: with the first 1 and the last 1 of 4 layers protected, at most 0."),
        ({"layout": "uniform"}, "--layout uniform makes all layers alike: it cannot protect some"),
        ({"alignment": "paper"}, "--alignment paper only knows the Taylor terms: add --space paper"),
        ({"compensation": "bias", "sequential": True}, "--sequential goes with --compensation least-squares, not bias"),
        ({"samples": 13}, "--samples 13 is more than the pool of 12 holds"),
        ({"pool": 5000}, "the text is too short: "),
        ({"objective_windows": 5000}, "the text is too short: "),
        ({"seq_len": 21}, "0 of "),
        ({"calibration": "wikitex2"}, "Did you mean 'wikitext2'"),
        ({"evaluate": "nowhere.txt"}, "there is no file nowhere.txt"),
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
        ("@calibration", "", "the objective would be drawn from"),
        ("", "@objective", "the report would be drawn from"),
        ("", "@calibration", "the report would be drawn from"),
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
        patch.setattr("adapruner.stages._measuring.load_model", lambda *_: pytest.fail("weights were loaded"))
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
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gptj"}')
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
        ("other", "Did you mean 'gpt2'?"),
        ("encoder", "'t5' is an encoder-decoder"),
        ("broken", "cannot load"),
        ("quantized", "this model is quantized"),
        ("missing", "no model at"),
        ("missing.gguf", "there is no GGUF file at"),
    ):
        refuse(command(tmp_path / model, tmp_path / "run", text_file), message, monkeypatch, capsys)
    refuse(command(Path("nobody/nothing"), tmp_path / "run", text_file), "cannot load 'nobody/", monkeypatch, capsys)


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
    refuse(other, "holds a run of another config (ratio 0.1 → 0.05)", monkeypatch, capsys)
    refuse(
        ["plan", str(tmp_path), "--ratio", "0.1", "-o", str(tmp_path / "b")], "no finished search", monkeypatch, capsys
    )
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
    arguments = ["evaluate", str(model_folder), "--perplexity", str(text_file), *option]
    refuse(arguments, option[1], monkeypatch, capsys)


def test_overwrite_starts_again(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    first = adapruner.prune(str(model_folder), tmp_path / "run", calibration=str(text_file), **OPTIONS)
    options = OPTIONS | {"ratio": 0.05}
    second = adapruner.prune(str(model_folder), tmp_path / "run", True, calibration=str(text_file), **options)
    assert first.plan.ratio > 0.09 > second.plan.ratio


def test_a_run_goes_on_layer_by_layer(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Which is what it says to do where memory gave out."""
    run = tmp_path / "run"
    shutil.copytree(finished.output, run)
    for name in ("plan.json", "result.json"):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    options = OPTIONS | {"evaluate": (str(text_file),), "layer_wise": True, "device": "cpu"}
    result = adapruner.prune(str(model_folder), run, calibration=str(text_file), **options)
    assert result.plan == finished.plan
    assert PruneConfig.load(run / "config.yaml").layer_wise


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
    perplexities = result["perplexity"][f"{text_file}@report"]
    assert card.data.eval_results[0].metric_value == round(perplexities["searched"]["perplexity"], 3)
    assert f"{perplexities['dense']['perplexity']:.2f}" in card.text
    assert result["plan_hash"][:12] in card.text
    assert "trust_remote_code=True" in card.text
    kept = [block for block in finished.plan.blocks if block.layer == 0]
    assert f"| 0 | {' | '.join(f'{len(block.kept)} of {block.groups}' for block in kept)} |" in card.text


def test_the_licence_of_the_base_model_is_carried_over(
    model_folder: Path, finished: adapruner.PruneResult, tmp_path: Path
) -> None:
    base = tmp_path / "base <b>|`x`"
    shutil.copytree(model_folder, base)
    result = finished.result | {"config": finished.result["config"] | {"model": str(base)}}
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
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
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
        (["--to", "stock", "-o", str(there), "--overwrite"], "something else"),
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
    assert calls[-1][1] == {"repo_id": "me/small", "folder_path": tmp_path / "stock"}


def test_layer_by_layer_leads_to_the_same_model(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """With everything in one dtype, and by a text that the model writes itself."""
    results = [
        adapruner.prune(
            str(model_folder),
            tmp_path / str(layer_wise),
            calibration="self",
            objective=str(text_file),
            evaluate=(str(text_file),),
            dtype="bfloat16",
            layer_wise=layer_wise,
            **OPTIONS,
        )
        for layer_wise in (False, True)
    ]
    assert results[0].plan.hash == results[1].plan.hash
    losses = [result.result["search"]["best_loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_vector_wise_terms_alone(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The best fixed metric is then the one that needs no gradient of a weight."""
    result = adapruner.prune(
        str(model_folder), tmp_path, calibration=str(text_file), terms="vector-wise", **OPTIONS | {"trials": 6}
    )
    assert result.result["search"]["best_fixed_name"] == "vectorize"
    assert "element_absolute" not in load_file(tmp_path / "statistics.safetensors")


def test_a_pruned_model_is_pruned_again(finished: adapruner.PruneResult, text_file: Path, tmp_path: Path) -> None:
    again = adapruner.prune(str(finished.model_folder), tmp_path, calibration=str(text_file), **OPTIONS | {"trials": 5})
    before, after = again.result["parameters"]["before"], again.result["parameters"]["after"]
    assert before == finished.result["parameters"]["after"]
    assert 0.095 <= 1 - after / before <= 0.105
    with pytest.raises(AdaPrunerError, match="whose layers differ already cannot be estimated"):
        verbs.estimate(finished.model_folder, **OPTIONS)


def test_quiet_leaves_results_and_advice(
    finished: adapruner.PruneResult, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = [*command(model_folder, tmp_path / "run", text_file), "--quiet", "--json"]
    environment = os.environ | {"FORCE_COLOR": "1", "NO_COLOR": "1"}
    process = subprocess.run([sys.executable, "-m", "adapruner", *arguments], capture_output=True, env=environment)
    assert json.loads(process.stdout)["plan_hash"] == finished.plan.hash
    said = process.stderr.decode().splitlines()
    assert said
    assert all(
        line.startswith(("adapruner: what stays was fitted on ", "adapruner: the feed-forward")) for line in said
    )


def test_advice_names_what_should_not_go_unseen(finished: adapruner.PruneResult) -> None:
    def advice(result: dict[str, object], widths: int = 24) -> str:
        blocks = [block.model_copy(update={"kept": tuple(range(widths))}) for block in finished.plan.blocks]
        plan = finished.plan.model_copy(update={"blocks": tuple(blocks)})
        return " | ".join(adapruner.PruneResult(finished.output, plan, finished.result | result).advice())

    def perplexities(dense: float, searched: float, recovered: float) -> dict[str, object]:
        models = {"dense": dense, "searched": searched, "recovered": recovered}
        return {"perplexity": {"text": {name: {"perplexity": value} for name, value in models.items()}}}

    enough: dict[str, object] = {"windows": {"compensation": 768}}
    assert advice(enough | perplexities(20, 30, 30)) == ""
    assert "rose from 20.0 to 50.0: --recover SRC" in advice(enough | perplexities(20, 50, 30))
    assert advice(enough | perplexities(20, 50, 30) | {"recovery": {"steps": 1}}) == ""
    assert "training it longer" in advice(enough | perplexities(20, 50, 45) | {"recovery": {"steps": 1}})
    assert "rose from 20.0 to nan" in advice(enough | perplexities(20, float("nan"), 30))
    assert "fitted on 40 windows" in advice(perplexities(20, 30, 30) | {"windows": {"compensation": 40}})
    assert "no multiples of 8" in advice(enough | perplexities(20, 30, 30), widths=23)

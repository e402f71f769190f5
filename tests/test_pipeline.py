"""The whole job on a tiny model: what comes out, in every mode, and how it is saved, shown and exported."""

import json
import random
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from pydantic import ValidationError

import adapruner
from adapruner import AdaPrunerError, PruneConfig, PruneOptions
from adapruner.budget.plan import PruningPlan
from adapruner.checkpoint import save_checkpoint
from adapruner.cli import shared as cli_options, with_options
from adapruner.evaluation.abilities import Abilities, Estimate, Verdict
from adapruner.importance import LLM_PRUNER_METRICS
from adapruner.model.places import find_model
from adapruner.report.card import _what_was_removed, model_card
from adapruner.report.result import ModelNumbers, RunResult
from adapruner.run.prune import estimate
from adapruner.search.study import SearchResult
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.windows import load_texts_by_use
from run_helpers import (
    QUICK,
    RUN_OPTIONS as OPTIONS,
    byte_tokenizer,
    exit_code,
    interrupt_before,
    prune_command,
    said_by,
    start_main,
)

Prune = Callable[..., adapruner.PruneResult]


def test_the_result_is_a_smaller_model_with_its_numbers(finished, model_folder, text_file):
    pruned = adapruner.load(finished.model_folder)
    result = RunResult.model_validate_json((finished.output / "result.json").read_bytes())
    assert result == finished.result
    assert [model.role for model in result.models] == ["dense", "pruned"]
    assert result.final.parameters == sum(parameter.numel() for parameter in pruned.parameters())
    assert 0.095 <= result.removed_share <= 0.105
    assert result.plan_hash == finished.plan.hash == PruningPlan.load(finished.output / "plan.json").hash
    assert result.search.best_loss <= result.search.best_fixed_loss
    text = f"{text_file}@report"
    for folder, role in ((finished.model_folder, "pruned"), (model_folder, "dense")):
        [evaluated] = adapruner.evaluate(folder, [text], seq_len=16).perplexity
        assert evaluated.perplexity == result.model(role).perplexity[text].perplexity
    assert set(result.stages) == {
        "loading",
        "checking text",
        "reading activations",
        "measuring",
        "comparing removals",
        "measuring costs",
        "writing answers",
        "solving built-in tasks",
        "comparing abilities",
        "searching",
        "cutting",
        "saving",
        "evaluating",
    }


def test_the_run_folder_holds_what_the_design_says(finished):
    files = "config.yaml windows.safetensors removals.safetensors statistics.safetensors costs.json study.jsonl"
    files += " search.json plan.json result.json report.html log.jsonl"
    folders = {"keys", "moments", "model", "evaluation"}
    assert {path.name for path in finished.output.iterdir()} - {".lock"} == {*files.split()} | folders
    perplexities = {f"perplexity-{role}.json" for role in ("dense", "pruned")}
    abilities = {f"abilities-{role}.json" for role in ("dense", "pruned")} | {"answers.safetensors", "chance.json"}
    assert {path.name for path in (finished.output / "evaluation").iterdir()} == perplexities | abilities | {
        "texts.safetensors"
    }


@pytest.mark.parametrize(("space", "alignment"), [("paper", "data"), ("paper", "paper"), ("extended", "data")])
@pytest.mark.parametrize("search", ["calibration", "metric"])
def test_parts_of_the_space_can_be_searched_alone(space, alignment, search, run, model_folder, text_file):
    options = OPTIONS | {"alignment": alignment, "search": search, "trials": 9, "space": space}
    interrupt_before("cutting", model_folder, run, calibration=str(text_file), overwrite=True, **options)
    result = SearchResult.model_validate_json((run / "search.json").read_bytes())
    assert len(result.points) == 9
    if search == "calibration":
        assert result.best.point == LLM_PRUNER_METRICS[result.best_fixed_name]
    else:
        assert list(result.best.samples) == sorted(random.Random(0).sample(range(OPTIONS["pool"]), OPTIONS["samples"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "paper", "compensation": "none"},
        {"space": "paper", "protect_first": None, "protect_last": None},
        {"layout": "uniform", "protect_first": None, "protect_last": None},
    ],
    ids=["paper", "paper compensated", "uniform"],
)
def test_other_ways(changes, prune, run, model_folder):
    """Every mode ends in a model that loads, meets the ratio, and has been found by a search of that mode."""
    shared = {"trials": 12, "ratio": 0.12, "overwrite": True}
    result = prune(**OPTIONS | shared | changes)
    assert abs(result.plan.ratio - 0.12) <= 0.005
    model = adapruner.load(result.model_folder)
    dense = adapruner.load(model_folder)
    if changes.get("layout") == "uniform":
        assert type(model) is type(dense)
        assert len({(block.kind, len(block.kept)) for block in result.plan.blocks}) == 2


def test_compensation_brings_the_model_nearer_to_the_dense_one(prune, run, model_folder, text_file, tmp_path):
    # What is held out is like what is fitted, else there is nothing to learn from random words.
    paragraphs = text_file.read_text().split("\n\n")[:4]
    (tmp_path / "text.txt").write_text("\n\n".join(f"{paragraphs[n % 4]} w{n}" for n in range(88)))
    result = prune(**OPTIONS | {"ratio": 0.15, "calibration": tmp_path / "text.txt", "overwrite": True})
    tokens = load_texts_by_use(run / "windows.safetensors")["compensation"].windows
    dense = adapruner.load(model_folder)
    with torch.no_grad():
        wanted = dense(tokens).logits
        plain = prune_model(dense, build_structure(dense), result.plan)(tokens).logits
        compensated = adapruner.load(result.model_folder)(tokens).logits
    assert (plain - wanted).norm() > (compensated - wanted).norm()


def test_the_windows_of_a_trial_are_as_many_as_the_text_has(prune, tmp_path):
    options = QUICK | {"objective_windows": 500, "seq_len": 5, "compensation": "none"}
    result = prune(**options).result
    there = len(load_texts_by_use(tmp_path / "run" / "windows.safetensors")["objective"])
    assert 64 <= there < 500
    assert max(point.windows for point in result.search.points) == there
    assert f"Judged on {there} windows of 5 tokens" in (tmp_path / "run" / "report.html").read_text("utf-8")
    with pytest.raises(AdaPrunerError, match="windows, 64 are needed"):
        prune(output=tmp_path / "other", **options | {"seq_len": 16})


def test_query_heads_end_to_end(prune, text_file):
    result = prune(**QUICK, head_granularity="query-head", head_share=1.0)
    assert any(len(block.kept) < block.groups for block in result.plan.blocks if block.kind == "heads")
    assert adapruner.evaluate(result.model_folder, [str(text_file)], seq_len=16, limit=3).perplexity[0].windows == 3
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    assert adapruner.load(result.model_folder).generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_json_on_stdout(verb, model_folder, text_file, capsys):
    extra = ["--evaluate", str(text_file), "--seq-len", "16", "--limit", "5"] if verb == "evaluate" else []
    assert exit_code([verb, str(model_folder), "--json", *extra]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == str(model_folder)
    if verb == "evaluate":
        assert content["perplexity"][0]["windows"] == 5
    else:
        assert content["parameters"] == sum(p.numel() for p in adapruner.load(model_folder).parameters())


def test_the_model_card_says_what_the_result_says(finished, text_file):
    card = ModelCard.load(finished.model_folder / "README.md")
    result = finished.result
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert card.data.base_model is None  # a local folder is no address on the hub
    perplexities = [result.model(role).perplexity[f"{text_file}@report"].perplexity for role in ("dense", "pruned")]
    assert card.data.eval_results[0].metric_value == round(perplexities[1], 3)
    assert all(f"| {perplexity:.2f} " in card.text for perplexity in perplexities)
    assert result.plan_hash[:12] in card.text
    assert "trust_remote_code=True" in card.text
    kept = [block for block in finished.plan.blocks if block.layer == 0]
    assert f"| 0 | {' | '.join(f'{len(block.kept)} of {block.groups}' for block in kept)} |" in card.text


@pytest.mark.parametrize(
    ("kept", "named"),
    [
        ({"heads": [4, 4], "channels": [8, 5]}, "feed-forward channels"),
        ({"heads": [4, 0], "channels": [8, 5]}, "whole attention layers, feed-forward channels"),
        ({"heads": [4, 2], "channels": [8, 8]}, "attention heads"),
        ({"heads": [0, 2], "channels": [8, 5]}, "attention heads, whole attention layers, feed-forward channels"),
        ({"heads": [4, 4], "experts": [6, 6]}, "experts"),
    ],
)
def test_the_model_card_names_what_was_removed(kept, named):
    groups = {"heads": 4, "channels": 8, "experts": 8}
    blocks = [
        SimpleNamespace(kind=kind, groups=groups[kind], kept=range(count)) for kind in kept for count in kept[kind]
    ]
    assert _what_was_removed(SimpleNamespace(blocks=blocks)) == named


def test_the_licence_of_the_base_model_is_carried_over(model_folder, finished, tmp_path):
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


def test_options_that_contradict_each_other_are_refused_where_they_are_made():
    with pytest.raises(ValidationError, match="`samples` 11 is more than the 10 of `pool`"):
        PruneOptions(samples=11, pool=10)
    # A recipe may give the other one.
    assert cli_options.PruneOptions(samples=100).samples == 100


def test_options_of_a_search_are_refused_where_nothing_is_searched(model_folder, text_file, tmp_path):
    options = {"output": tmp_path / "run", "pool": 20, "objective": str(text_file)}
    with pytest.raises(AdaPrunerError, match="without a search, `objective`, `pool` would do nothing: add `trials`"):
        adapruner.prune(str(model_folder), str(text_file), **options)
    assert not (tmp_path / "run").exists()


def test_a_model_is_exported(make_model, tmp_path, capsys):
    tokenizer, output = byte_tokenizer(), tmp_path / "a model.gguf"
    model = make_model(vocab_size=len(tokenizer), attention_bias=False, mlp_bias=False)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--to", "gguf", "--gguf-type", "f32", "-o", str(output), "--json"]
    assert exit_code(arguments) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == output.stat().st_size
    tokens = torch.arange(3, 19).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(adapruner.load(output)(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_layer_by_layer_leads_to_the_same_model(prune, text_file, tmp_path):
    """With everything in one dtype, and by a text that the model writes itself. It is what a run is told to do where
    memory gives out, and decides last digits: it is not mixed with what was made otherwise."""
    texts = {"calibration": f"mix:0.5,{text_file}", "objective": str(text_file)}
    options = QUICK | texts | {"dtype": "bfloat16", "heal": "1k"}
    resident = prune(layer_wise=False, **options)
    with pytest.raises(AdaPrunerError, match=r"layer_wise.*\): windows.safetensors, .* would be rebuilt"):
        prune(layer_wise=True, **options)
    result = prune(layer_wise=True, overwrite=True, **options)
    assert PruneConfig.load(result.output / "config.yaml").layer_wise
    assert result.plan.hash == resident.plan.hash
    assert result.result.search.best_loss == pytest.approx(resident.result.search.best_loss, rel=1e-3)
    assert [model.role for model in result.result.models] == [model.role for model in resident.result.models]
    for text, measured in result.result.final.perplexity.items():
        assert measured.perplexity == pytest.approx(resident.result.final.perplexity[text].perplexity, rel=1e-2)
    assert "; layer by layer, it rests on built-in texts." in (result.output / "model" / "README.md").read_text()


def test_a_pruned_model_is_pruned_again(finished, prune):
    again = prune(model=str(finished.model_folder), **QUICK)
    assert again.result.model("dense").parameters == finished.result.final.parameters
    assert 0.095 <= again.result.removed_share <= 0.105
    with pytest.raises(AdaPrunerError, match="whose layers differ already cannot be estimated"):
        estimate(finished.model_folder, **OPTIONS)


def test_quiet_leaves_results_and_advice(finished, run, model_folder, text_file, tmp_path):
    """Of a process of its own, which completes a run from the search on."""
    for path in (run / "search.json", run / "study.jsonl", run / "plan.json"):
        path.unlink()
    for path in (run / "model", run / "evaluation"):
        shutil.rmtree(path)
    arguments = [*prune_command(model_folder, run, text_file), "--quiet", "--json"]
    process = start_main(dict, (), arguments, tmp_path, FORCE_COLOR="1", NO_COLOR="1")
    process.join()
    lines = said_by(process, tmp_path).splitlines()
    advice = [line for line in lines if line.startswith("advice: ")]
    assert finished.advice()
    assert advice == [f"advice: {with_options(line)}" for line in finished.advice()]
    assert json.loads("\n".join(line for line in lines if line not in advice))["plan_hash"] == finished.plan.hash


def test_advice_names_what_should_not_go_unseen(finished, text_file, tmp_path):
    known = finished.result.final.perplexity[f"{text_file}@report"]

    def advice(dense: float = 20, final: float = 30, compensation: int = 768, **changes: Any) -> str:
        models = [
            finished.result.final.model_copy(
                update={"role": role, "perplexity": {"text": known.model_copy(update={"perplexity": value})}}
            )
            for role, value in (("dense", dense), ("pruned", final))
        ]
        changes |= {"models": tuple(models), "windows": {"compensation": {"text": compensation}}}
        point = finished.result.search.points[0].model_copy(update={"starting_point": False})
        changes["search"] = finished.result.search.model_copy(update={"points": (point,)})
        return " | ".join(
            adapruner.PruneResult(tmp_path, finished.plan, finished.result.model_copy(update=changes)).advice()
        )

    def damaged(share: float, verdict: Verdict, at_chance: str = "") -> str:
        left = {"code": Estimate(rise=1, left=share, least=share, most=share, at_chance=at_chance)}
        abilities = Abilities(reads={}, writes={})
        models = (
            ModelNumbers(role="dense", parameters=1, abilities=abilities),
            ModelNumbers(role="pruned", parameters=1, abilities=abilities, left=left, verdict=verdict),
        )
        result = finished.result.model_copy(update={"models": models})
        return " | ".join(adapruner.PruneResult(tmp_path, finished.plan, result).advice())

    assert "lost" not in damaged(1.0, "usable")
    said, lost, remedy, _, text, *_ = damaged(0.5, "recover first").split(" | ")
    assert text == "code lost most: half python-code as `calibration` (mix,python-code:0.5) keeps nearly half of that"
    assert said == "the model should be trained further before use"
    assert lost == "what it lost most: code, 50% left (50% to 50%)"
    assert remedy == "more tokens of `heal`, or a lower `ratio`, helps"
    assert damaged(0.0, "broken").startswith("the model is broken | what it lost most: code, 0% left")
    assert damaged(0.5, "usable", "cannot be judged: why").startswith("code cannot be judged: why")
    unjudged = [f"{kind} {left}" for kind, left in finished.result.final.left.items() if left.at_chance]
    assert unjudged
    assert advice() == " | ".join(unjudged)  # a random model is at chance
    assert "rose from 20.0 to 50.0 | more tokens of `heal`, or a lower `ratio`, helps" in advice(final=50)
    assert "rose from 20.0 to nan" in advice(final=float("nan"))
    assert "fitted on 40 windows" in advice(compensation=40)


def test_attention_that_the_family_cannot_lose_is_refused_before_anything_is_made(
    make_model, tokenizer, prune, tmp_path
):
    save_checkpoint(make_model("bloom"), tokenizer, tmp_path / "bloom")
    with pytest.raises(AdaPrunerError, match=r"`remove_attention`: models of the family bloom cannot lose"):
        prune(model=str(tmp_path / "bloom"), **OPTIONS, remove_attention=True)
    assert not (tmp_path / "run").exists()

"""Objects in, objects out: what is in memory gives what files give, and type checkers know the options."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError, PruneOptions, formats
from adapruner.importance import Term
from adapruner.measurement.taylor import Statistics
from adapruner.run.choice import _content_of_term
from adapruner.run.given import save_model
from adapruner.run.inputs import HELD_OUT_TO_HEAL
from adapruner.text.windows import load_texts_by_use
from run_helpers import QUICK, RUN_OPTIONS, stages_done

Prune = Callable[..., adapruner.PruneResult]


@pytest.fixture
def loaded(model):
    """Made in this process, and never saved; the files of `model_folder` are of the same weights."""
    return model


@pytest.fixture
def documents(text_file):
    return text_file.read_text().split("\n\n")


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("architectures", "dtype")}
    return own | {"training": model.training, "config": config, "settings": model.generation_config}


def test_a_model_and_texts_in_memory_give_the_plan_of_files(finished, loaded, tokenizer, documents, tmp_path):
    before = state_of(loaded)
    options = {"tokenizer": tokenizer, "output": tmp_path / "run", **RUN_OPTIONS}
    result = adapruner.prune(loaded, documents, **options)
    assert result.plan == finished.plan
    after = state_of(loaded)
    assert all(torch.equal(before.pop(name), after.pop(name)) for name in loaded.state_dict())
    assert before == after
    # The same objects again resume the run, from what is in its folder; other ones are told.
    again = adapruner.prune(loaded, iter(documents), **options)
    assert again.result == result.result
    with torch.no_grad():
        loaded.lm_head.weight[0] += 1
    with pytest.raises(AdaPrunerError, match=r"holds a run of another configuration.*another model"):
        adapruner.prune(loaded, documents, **options)


def test_a_temporary_run_lasts_as_long_as_its_result(model_folder, loaded, tokenizer, documents):
    rows = datasets.Dataset.from_dict({"id": list(range(len(documents))), "text": documents})
    result = adapruner.prune(loaded, rows, tokenizer=tokenizer, **QUICK)
    of_list = adapruner.prune(str(model_folder), documents, config=PruneOptions(**QUICK), seed=0)
    assert result.plan == of_list.plan
    folder, pruned = result.output, result.model
    assert sum(parameter.numel() for parameter in pruned.parameters()) == result.result.final.parameters
    assert result.tokenizer("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    assert folder.is_dir()
    del result
    gc.collect()
    assert not folder.exists()
    assert pruned(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_windows_are_used_as_they_are_and_each_for_one_thing(prune, tmp_path):
    windows = torch.randint(3, 96, (60, 12), generator=torch.Generator().manual_seed(0))
    options = QUICK | {"pool": 6, "objective_windows": 12, "compensation_windows": 60}
    options.pop("seq_len")
    result = prune(calibration=windows, **options)
    texts = load_texts_by_use(result.output / "windows.safetensors")
    used = {use: text.windows for use, text in texts.items()}
    used["report"] = load_file(result.output / "evaluation" / "texts.safetensors").popitem()[1]
    given = {str(window) for window in windows.tolist()}
    by_use = {use: {str(window) for window in own.tolist()} for use, own in used.items()}
    assert all(own <= given for own in by_use.values())
    # Compensation is fitted on the text that the pool is drawn from.
    assert by_use["pool"] <= by_use["compensation"]
    assert not by_use["compensation"] & by_use["objective"]
    assert not (by_use["compensation"] | by_use["objective"]) & by_use["report"]
    assert by_use["compensation"] | by_use["objective"] | by_use["report"] == given
    assert result.result.config.seq_len == 12
    again = prune(calibration=windows, from_=result.output, output=tmp_path / "again", **options | {"ratio": 0.15})
    assert "reading activations" not in stages_done(again.output)
    with pytest.raises(AdaPrunerError, match="int64, of shape"):
        prune(calibration=windows.float(), output=tmp_path / "other", **options)
    with pytest.raises(AdaPrunerError, match="set `seq_len` to that"):
        prune(calibration=windows, output=tmp_path / "other", seq_len=16, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "needs its `tokenizer`"),
        ({"model": torch.nn.Linear(2, 2)}, "a Linear is not a PreTrainedModel"),
        ({"calibration": [1, 2]}, "item 1 of `calibration` is a int"),
        ({"calibration": 5}, "`calibration` is a int"),
        ({"calibration": []}, "`calibration` holds no text"),
        ({"calibration": [{"a": "x", "b": "y"}]}, "`calibration` has the columns a, b"),
        ({"trials": -1}, "`trials` -1 must be at least 0"),
        ({"trials": 0, "space": "paper"}, "`space` paper and `search` calibration or metric are searches"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_kept(
    changes, message, loaded, tokenizer, documents, tmp_path
):
    given: dict[str, Any] = {"model": loaded, "calibration": documents, "tokenizer": tokenizer, **QUICK} | changes
    with pytest.raises(AdaPrunerError, match=message):
        adapruner.prune(given.pop("model"), given.pop("calibration"), output=tmp_path / "run", **given)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_weights_that_are_no_ordinary_ones_are_refused(make_model, tokenizer, documents):
    alike, shared, quantized = make_model(), make_model(), make_model()
    alike.model.layers[1] = alike.model.layers[0]
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    up = quantized.model.layers[1].mlp.up_proj
    del up.weight
    up.register_buffer("weight", torch.zeros(24, 48, dtype=torch.int8))
    for model in (alike, shared, quantized):
        with pytest.raises(AdaPrunerError, match=r"has no model\.layers\.1\..* of its own"):
            adapruner.prune(model, documents, tokenizer=tokenizer, **QUICK)


def test_the_name_of_a_model_in_memory_may_be_a_folder_above(loaded, tokenizer, tmp_path):
    loaded.name_or_path = ".."
    assert Path(save_model(loaded, tokenizer, tmp_path)).parent == tmp_path


def test_what_is_no_path_is_refused(model_folder):
    with pytest.raises(AdaPrunerError, match="invalid path '5'"):
        adapruner.prune(str(model_folder), output=5)
    with pytest.raises(AdaPrunerError, match="invalid path 'None'"):
        adapruner.recover(None)


def test_a_run_finds_its_gradients_whatever_the_caller_does(finished, prune, tmp_path):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert prune(**RUN_OPTIONS, output=tmp_path / mode.__name__).plan == finished.plan


def test_a_term_is_known_by_its_file(tmp_path):
    names = set[str]()
    path = tmp_path / "own.py"
    for content in ("def term(statistics): return [1.0]\n", "def term(statistics): return [2.0]\n"):
        path.write_text(content)
        own: dict[str, Any] = {}
        exec(compile(content, str(path), "exec"), own)
        names.add(_content_of_term(Term("term", own["term"], "inputs", "activation"))[-1])
    assert len(names) == 2
    exec("def unwritten(statistics): return [1.0]", own)
    assert _content_of_term(Term("unwritten", own["unwritten"], "inputs", "activation")) == ["activation", 0.0, []]


def test_documents_in_memory_are_evaluated_as_a_file_with_them(model_folder, text_file, documents):
    [of_file] = adapruner.evaluate(model_folder, str(text_file), seq_len=16).perplexity
    [of_list] = adapruner.evaluate(model_folder, {"own": documents}, seq_len=16).perplexity
    [of_one] = adapruner.evaluate(model_folder, {"own": "\n\n".join(documents)}, seq_len=16).perplexity
    assert of_list.perplexity == of_file.perplexity
    assert of_one == of_list
    assert of_list.text == "own"


def test_a_model_in_memory_is_to_be_saved_first(loaded, tmp_path):
    for use in (adapruner.evaluate, adapruner.benchmark, lambda model: adapruner.export(model, "gguf", tmp_path / "a")):
        with pytest.raises(AdaPrunerError, match="a LlamaForCausalLM does not name a model: save it") as refusal:
            use(loaded)
        assert "\n" not in str(refusal.value)


def test_the_steps_one_by_one_make_the_model_of_a_run(finished, loaded):
    structure = adapruner.inspect(loaded)
    texts = load_texts_by_use(finished.output / "windows.safetensors")
    statistics = adapruner.measure(loaded, structure, texts["pool"].windows)
    of_run = Statistics.load(finished.output / "statistics.safetensors")
    for name, values in statistics.per_sample.items():
        torch.testing.assert_close(values, of_run.per_sample[name], rtol=1e-3, atol=1e-7)

    point = {"fine_first": 1.0, "fluctuation": 2.0}
    with pytest.raises(AdaPrunerError, match="no metric 'param_frist': expected vectorize, param_first"):
        adapruner.score(statistics, structure, "param_frist")
    with pytest.raises(AdaPrunerError, match="not weights of terms"):
        adapruner.score(statistics, structure, {"no_such": 1.0})
    scores = adapruner.score(statistics, structure, point)
    for wrong in (scores[1:], torch.full_like(scores, torch.nan)):
        with pytest.raises(AdaPrunerError, match="one for every group"):
            adapruner.PruningPlan.from_scores(structure, wrong, 0.1, round_to=1)
    plan = adapruner.PruningPlan.from_scores(structure, scores, 0.1, round_to=1, protect_first=1, protect_last=1)
    assert abs(plan.ratio - 0.1) < 0.005
    for block, own, numbers in zip(
        structure.blocks, plan.blocks, scores.split([block.groups for block in structure.blocks]), strict=True
    ):
        removed = sorted(set(range(block.groups)) - set(own.kept))
        assert not removed or numbers[removed].max() <= numbers[list(own.kept)].min()
    kept = [list(block.kept) for block in plan.blocks]
    assert adapruner.PruningPlan.of(structure, kept) == plan
    with pytest.raises(AdaPrunerError, match="these groups make no plan"):
        adapruner.PruningPlan.of(structure, [[99], *kept[1:]])

    text = texts["compensation"].held_out(HELD_OUT_TO_HEAL)[0].windows
    compensated = adapruner.compensate(loaded, structure, finished.plan, text).state_dict()
    for name, tensor in finished.model.state_dict().items():
        torch.testing.assert_close(compensated[name], tensor, rtol=1e-3, atol=1e-5)
    plain = adapruner.cut(loaded, structure, finished.plan).state_dict()
    assert any(not torch.equal(plain[name], tensor) for name, tensor in compensated.items())


def test_an_export_is_one_file(model_folder, tmp_path, monkeypatch):
    """That of docs/contribute/additions.md, beside those of the package."""
    page = Path(__file__).parents[1] / "docs" / "contribute" / "additions.md"
    diff = page.read_text(encoding="utf-8").partition("formats/shapes.py\n")[2].partition("```")[0]
    (tmp_path / "shapes.py").write_text("\n".join(line.removeprefix("+") for line in diff.splitlines()))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.setattr(formats, "_FORMATS", dict(formats.formats()))
    adapruner.export(model_folder, "shapes", tmp_path / "shapes.json")
    shapes = {name: list(tensor.shape) for name, tensor in adapruner.load(model_folder).state_dict().items()}
    assert json.loads((tmp_path / "shapes.json").read_text()) == shapes
    with pytest.raises(AdaPrunerError, match="no format 'onnx': expected decilm or gguf or shapes"):
        adapruner.export(model_folder, "onnx", tmp_path / "a")

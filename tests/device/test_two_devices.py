"""Two GPUs: one process on the second, and a process on each."""

import json

import pytest

import adapruner
from adapruner.run.recover import RecoveryFolder
from device.client import LAYER_WISE, SMALL_RUN, Outcome, only_json, only_line, pruning, recovering
from device.test_commands import STEPS
from run_helpers import flags

pytestmark = pytest.mark.device_matrix


def peaks(outcome: Outcome) -> list[int]:
    """The most bytes that each process held."""
    lines = [line.split() for line in outcome.stderr.splitlines() if line.startswith("rank ")]
    return [int(line[3]) for line in sorted(lines)]


def test_the_second_gpu_alone_is_used(two_devices, family, text_file, tmp_path):
    options = SMALL_RUN | LAYER_WISE | {"heal": "none"}
    outcome = two_devices.run(*pruning(family("llama"), text_file, tmp_path / "a", options), "--device", "cuda:1")
    only_json(outcome)
    # Of the first device.
    assert {stage.name: stage.peak for stage in outcome.stages if stage.peak} == {}


@pytest.mark.parametrize("model_type", ["llama", "jamba"])
def test_layers_on_two_gpus_give_plan_and_scales_of_the_cpu(model_type, two_devices, family, text_file, tmp_path):
    options = SMALL_RUN | ({"ratio": STEPS[model_type]} if model_type in STEPS else {})
    plans, results = [], []
    for place in ("cuda:0,cuda:1", "cpu"):
        output = tmp_path / place[:3]
        command = pruning(family(model_type), text_file, output, options)
        outcome = two_devices.run(*command, "--evaluate", text_file, "--device", place, native_bfloat16=False)
        results.append(only_json(outcome))
        plans.append(adapruner.PruningPlan.load(output / "plan.json").hash)
        moved = {stage for stage, kind, *_ in outcome.events if kind == "p2p"}
        assert ({"measuring", "searching", "evaluating"} <= moved) == (place != "cpu")
        assert outcome.left == 0
    assert plans[0] == plans[1]
    losses = [result["healing"] and result["healing"]["losses_by_rate"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2, abs=1e-6)
    assert bool(losses[0]) == (model_type == "llama")  # adapters cannot scale Jamba
    for ours, of_cpu in zip(results[0]["models"], results[1]["models"], strict=True):
        assert ours["perplexity"].keys() == of_cpu["perplexity"].keys()
        for name, one in of_cpu["perplexity"].items():
            assert ours["perplexity"][name]["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)


PROGRAM = """
import json, sys, torch
from adapruner.families import open_model
from adapruner.model.layers import layer_devices
from adapruner.model.places import find_model

def outputs(folder, device):
    model = open_model(find_model(folder), device=device)
    tokens = torch.arange(3, 27).view(2, 12).to(model.device)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.cpu()
        written = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return logits, written.tolist(), sorted({{str(device) for device in layer_devices(model)}})

results = {{}}
for name, folder in {folders!r}.items():
    logits, written, devices = outputs(folder, "cuda:0,cuda:1")
    expected, of_one, _ = outputs(folder, "cuda:0")
    results[name] = [devices, torch.equal(logits, expected), written == of_one]
print(json.dumps(results))
"""


@pytest.mark.timeout(900)  # families are inferred, if no other test has done it
def test_families_compute_the_same_on_two_gpus(two_devices, family, tmp_path):
    """To the last bit, with and without a cache, which holds what belongs to a layer where the layer is."""
    families = ("gemma2", "jamba", "llama", "mixtral")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folders={name: str(family(name)) for name in families}))
    outcome = two_devices.run(file=program)
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout) == {name: [["cuda:0", "cuda:1"], True, True] for name in families}


def test_a_model_that_is_too_large_for_one_gpu_is_spread_over_two(two_devices, family, text_file, tmp_path):
    # Wide enough for the weights to be the most of it.
    sizes = {"num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    options, model = SMALL_RUN, family("llama", **sizes)
    costs = {}
    for place in ("cuda:0", "cuda:0,cuda:1"):
        cost = only_json(two_devices.run("inspect", model, "--cost", "--json", *flags(options), "--device", place))
        assert (cost["device"], cost["layer_wise"]) == (place, False)
        costs[place] = cost["device_bytes"]
    memory = (costs["cuda:0"] + costs["cuda:0,cuda:1"]) * 2 // 3
    assert costs["cuda:0,cuda:1"] < 0.75 * memory < costs["cuda:0"]
    outcome = two_devices.run(*pruning(model, text_file, tmp_path / "a", options), memory=memory)
    only_json(outcome)
    assert "p2p" in {kind for stage, kind, *_ in outcome.events if stage == "searching"}
    assert json.loads((tmp_path / "a/keys/search.json.json").read_text())["leaves"]["placement"]["layer_wise"] is False


def test_evaluating_uses_as_many_gpus_as_the_weights_need(two_devices, family, text_file):
    model = family("llama", num_hidden_layers=24)
    command = ["evaluate", model, "--evaluate", text_file, "--seq-len", 16, "--limit", 8, "--json"]
    whole = two_devices.run(*command)
    weights = next(stage.after for stage in whole.stages if stage.name == "loading")
    spread = two_devices.run(*command, memory=weights)
    assert only_json(spread)["perplexity"] == only_json(whole)["perplexity"]
    moved = [{kind for stage, kind, *_ in outcome.events if stage == "evaluating"} for outcome in (whole, spread)]
    assert ["p2p" in kinds for kinds in moved] == [False, True]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("cuda:0,cuda:0", "name different devices"),
        ("cuda:0,cpu", "of one type"),
        ("cuda,cuda:1", "each with its number"),
    ],
)
def test_devices_that_cannot_share_a_model_are_refused(place, said, two_devices, family, text_file):
    outcome = two_devices.run("evaluate", family("llama"), "--evaluate", text_file, "--device", place)
    assert said in only_line(outcome)


@pytest.mark.parametrize("command", [pruning, recovering])
def test_training_on_the_second_gpu_alone_says_how(command, two_devices, family, text_file, tmp_path):
    outcome = two_devices.run(*command(family("llama"), text_file, tmp_path / "a"), "--device", "cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in only_line(outcome)
    assert not outcome.stages


def test_there_is_no_third_gpu(two_devices, family, text_file):
    outcome = two_devices.run("evaluate", family("llama"), "--evaluate", text_file, "--device", "cuda:2")
    assert only_line(outcome).startswith("--device cuda:2: CUDA error: invalid device ordinal")


@pytest.mark.parametrize(("train", "method"), [("lora", "distillation"), ("full", "labels")])
def test_two_processes_recover(train, method, launch, family, text_file, tmp_path):
    teacher = ["--teacher", family("llama")] if method == "distillation" else []
    command = recovering(family("llama"), text_file, tmp_path / "a", train=train)
    outcome = launch(*command, *teacher)
    assert only_json(outcome)["steps"] == 3
    assert all(peaks(outcome))
    assert sum(": done in" in line for line in outcome.stderr.splitlines()) == 2
    assert not RecoveryFolder(tmp_path / "a").unfinished.exists()


def test_all_weights_are_trained_though_an_attention_is_gone(launch, two_devices, family, text_file, tmp_path):
    """The norm in front of it gets no gradient."""
    options = SMALL_RUN | {"remove_attention": True, "ratio": 0.3, "trials": 13}
    only_json(two_devices.run(*pruning(family("llama"), text_file, tmp_path / "run", options)))
    plan = adapruner.PruningPlan.load(tmp_path / "run" / "plan.json")
    assert any(not block.kept for block in plan.blocks)
    only_json(launch(*recovering(tmp_path / "run/model", text_file, tmp_path / "a", train="full")))

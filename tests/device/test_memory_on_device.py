"""A GPU that is too small: a run says so in one line, and resumes on a larger one."""

import json
from pathlib import Path

import pytest

from adapruner.budget.plan import PruningPlan
from device.client import LAYER_WISE, SMALL_RUN, only_json, only_line, pruning, recovering
from run_helpers import flags

pytestmark = pytest.mark.device_matrix

# All stages of a run that hold tensors on the device.
STAGES = (
    *("loading", "checking text", "reading activations", "measuring", "comparing removals", "measuring costs"),
    *("searching", "cutting", "healing", "writing answers", "evaluating", "comparing abilities"),
)


def command(model: Path, text: Path, output: Path) -> list[object]:
    return [*pruning(model, text, output), "--evaluate", text]


@pytest.fixture(scope="module")
def undisturbed(device, family, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    outcome = device.run(*command(family("llama"), text_file, output))
    only_json(outcome)
    return output, outcome


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_runs_out_of_memory_says_so_and_resumes(stage, device, undisturbed, family, text_file, tmp_path):
    folder, outcome = undisturbed
    needed = max(one.peak - one.held for one in outcome.stages if one.name == stage)
    arguments = command(family("llama"), text_file, tmp_path / "a")
    message = only_line(device.run(*arguments, limits={stage: needed // 2}))
    assert "out of memory" in message
    assert message.startswith(f"{stage}: ") or stage in ("loading", "cutting")
    only_json(device.run(*arguments))
    assert PruningPlan.load(tmp_path / "a/plan.json").hash == PruningPlan.load(folder / "plan.json").hash
    results = [json.loads((one / "result.json").read_text())["models"] for one in (folder, tmp_path / "a")]
    assert results[0] == results[1]


def test_the_stages_are_those_of_a_run(undisturbed):
    _, outcome = undisturbed
    assert {stage.name for stage in outcome.stages if stage.peak > stage.held} == set(STAGES)


def test_memory_that_cannot_do_is_refused_before_anything_is_read(device, family, text_file, tmp_path):
    outcome = device.run(*command(family("llama"), text_file, tmp_path / "a"), memory=200_000)
    assert only_line(outcome).startswith("Not enough memory: ")
    assert not any(stage.peak for stage in outcome.stages)


def test_a_model_that_does_not_fit_is_pruned_layer_by_layer(device, family, text_file, tmp_path):
    """The estimate is above what is needed; with a fifth of what the whole model would need, it goes layer by layer."""
    options = {name: value for name, value in (SMALL_RUN | LAYER_WISE).items() if name != "layer_wise"}
    # Of many layers: layer by layer, more samples and trials are in memory at once.
    model = family("llama", num_hidden_layers=24)
    arguments = pruning(model, text_file, tmp_path / "a", options)
    estimates = {}
    for layer_wise in ("--layer-wise", "--no-layer-wise"):
        cost = only_json(device.run("inspect", model, "--cost", "--json", *flags(options), layer_wise))
        estimates[layer_wise] = cost["device_bytes"]
    assert estimates["--layer-wise"] < estimates["--no-layer-wise"]
    memory = (estimates["--layer-wise"] + estimates["--no-layer-wise"]) // 2
    only_json(device.run(*arguments, memory=memory))
    assert json.loads((tmp_path / "a/keys/search.json.json").read_text())["leaves"]["placement"]["layer_wise"] is True


def test_a_model_that_does_not_fit_is_evaluated_layer_by_layer(device, family, text_file):
    """On a GPU with memory for two thirds of the weights, of 24 layers."""
    model = family("llama", num_hidden_layers=24)
    command = ["evaluate", model, "--evaluate", text_file, "--seq-len", 16, "--limit", 8, "--json"]
    whole = device.run(*command)
    weights = next(stage.after for stage in whole.stages if stage.name == "loading")
    small = device.run(*command, memory=2 * weights // 3)
    assert only_json(small)["perplexity"] == only_json(whole)["perplexity"]
    assert max(stage.peak for stage in small.stages) < 2 * weights // 3
    refused = only_line(device.run(*command, "--no-layer-wise", memory=2 * weights // 3))
    assert "out of memory" in refused


@pytest.mark.parametrize(
    ("verb", "stage"),
    [("recover", "loading"), ("recover", "recovering"), ("evaluate", "evaluating"), ("benchmark", "measuring")],
)
def test_other_commands_that_run_out_of_memory_say_so(verb, stage, device, undisturbed, family, text_file, tmp_path):
    model = undisturbed[0] / "model"
    taught = ["--teacher", family("llama")]
    arguments: dict[str, list[object]] = {
        "recover": [*recovering(model, text_file, tmp_path / "a")[2:-1], *taught],
        "evaluate": ["--evaluate", text_file, "--seq-len", 16],
        "benchmark": ["--against", family("llama"), "--prompt", 8, "--new-tokens", 2, "--repetitions", 1],
    }
    whole = device.run(verb, model, *arguments[verb], "--json")
    only_json(whole)
    needed = max(one.peak - one.held for one in whole.stages if one.name == stage)
    again = [tmp_path / "b" if argument == tmp_path / "a" else argument for argument in arguments[verb]]
    message = only_line(device.run(verb, model, *again, "--json", limits={stage: needed // 2}))
    assert "out of memory" in message


@pytest.fixture(scope="module")
def long_text_file(text_file, tmp_path_factory):
    """200 different paragraphs of 160 words."""
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    paragraphs = text_file.read_text().split("\n\n")
    rotated = (paragraphs[start:] + paragraphs[:start] for start in range(len(paragraphs)))
    path.write_text("\n\n".join(" ".join(each[:8]) for each in rotated))
    return path


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize(
    ("hidden", "channels", "dtype"), [(256, 768, "float32"), (320, 960, "bfloat16"), (384, 1152, "float32")]
)
def test_estimates_are_what_is_needed(hidden, channels, dtype, layer_wise, device, family, long_text_file, tmp_path):
    """The largest peak of a run is within a quarter of it."""
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "head_dim": 64, "num_hidden_layers": 6}
    model = family("llama", dtype, vocab_size=2048, **sizes)
    tokens = {"seq_len": 64, "pool": 16, "objective_windows": 16, "compensation_windows": 24}
    options = SMALL_RUN | {"layer_wise": False} | (LAYER_WISE if layer_wise else {}) | tokens
    estimate = only_json(device.run("inspect", model, "--cost", "--json", *flags(options)))["device_bytes"]
    # Trials hold second moments where there is room, which is not estimated: there is little.
    command = pruning(model, long_text_file, tmp_path / "a", options)
    outcome = device.run(*command, memory=5 * estimate // 4)
    only_json(outcome)
    peak = max(stage.peak for stage in outcome.stages)
    assert 0.75 * estimate < peak < 1.25 * estimate, (peak, estimate)


def test_adapters_cost_what_their_shapes_say(device, family, text_file, tmp_path):
    """With gradient checkpointing, a layer more is its weights, its adapters with their gradients and two moments, and
    the hidden state in front of it."""
    hidden, channels, heads, tokens = 128, 384, 64, 4 * 16  # two KV heads of 32 beside four query heads
    options = {"micro_batch_size": 4, "batch_size": 8, "gradient_checkpointing": True}
    # A vocabulary in whose logits the peak is, as in models for use.
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "head_dim": 32, "vocab_size": 4096}
    peaks = []
    for layers in (2, 4, 6):
        model, output = family("llama", "bfloat16", num_hidden_layers=layers, **sizes), tmp_path / str(layers)
        outcome = device.run(*recovering(model, text_file, output, **options))
        only_json(outcome)
        peaks.append(max(stage.peak for stage in outcome.stages))
    weights = 2 * hidden * (hidden + heads) + 3 * hidden * channels + 2 * hidden
    adapters = 8 * (2 * (hidden + hidden) + 2 * (hidden + heads) + 3 * (hidden + channels))
    of_layer = 2 * weights + 16 * adapters + 2 * tokens * hidden
    assert [(peaks[1] - peaks[0]) / 2, (peaks[2] - peaks[1]) / 2] == pytest.approx([of_layer, of_layer], rel=0.02)

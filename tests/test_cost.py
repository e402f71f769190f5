"""What a run is said to take, against what it takes, and what becomes of runs that do not fit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from adapruner import AdaPrunerError, PruneConfig, verbs
from adapruner.cli import main
from adapruner.cost import GIB, Cost, Memory, available_memory, estimate_cost
from adapruner.cost._memory import saved_activations
from adapruner.job import prepare, reference_budget
from adapruner.models import empty_model, known_architectures
from adapruner.run_folder import RunFolder
from adapruner.structure import build_structure

SMALL = {"pool": 6, "samples": 3, "objective_windows": 4, "seq_len": 16, "compensation_windows": 8, "trials": 4}


def cost_of(model_config: LlamaConfig, device: str = "cpu", **options: object) -> Cost:
    model = empty_model(model_config)
    structure = build_structure(model)
    config = PruneConfig(model="x", **options)
    return estimate_cost(config, model, structure, reference_budget(config, structure), torch.device(device))


@pytest.mark.parametrize("family", known_architectures())
def test_saved_activations_are_what_one_layer_more_keeps(
    family: str, make_model: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    """Of the whole model, by PyTorch's own account."""
    kept = []
    model = make_model(family)
    for layers in (2, 3):
        config = model.config.to_dict() | {"num_hidden_layers": layers}
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:layers]
        shorter = type(model)(type(model.config).from_dict(config)).eval()
        seen: dict[int, int] = {}

        def keep(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        embedded = shorter.get_input_embeddings()(windows).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = shorter(inputs_embeds=embedded, use_cache=False).logits
        weights = {parameter.untyped_storage().data_ptr() for parameter in shorter.parameters()}
        kept.append(sum(size for storage, size in seen.items() if storage not in weights))
        del logits
    of_layer = saved_activations(model.config, torch.float32) * windows.numel()
    assert of_layer == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_a_7b_model_takes_what_its_shapes_say() -> None:
    """LLaMA-7B has 6,738,415,616 parameters, 202,383,360 in a layer."""
    llama = LlamaConfig(dtype="bfloat16")
    whole, by_layer = cost_of(llama, layer_wise=False), cost_of(llama, layer_wise=True)
    assert whole.memory["loading"].device == 2 * 6_738_415_616
    assert by_layer.memory["loading"].device == 2 * (6_738_415_616 - 31 * 202_383_360)
    deeper = LlamaConfig(dtype="bfloat16", num_hidden_layers=64)
    measuring = [cost_of(config, layer_wise=True).memory["measuring"].device for config in (llama, deeper)]
    assert measuring[0] == measuring[1] < 3 * GIB
    on_gpu = cost_of(llama, "cuda", layer_wise=True)
    assert on_gpu.memory[on_gpu.largest].device < 12 * GIB
    # Four fifths of all, less both embeddings and the four layers in front of the first cut.
    cut = 0.8 * 6_738_415_616 - 2 * 32_000 * 4096 - 4 * 202_383_360
    assert 2 * cut < on_gpu.memory["searching"].host < 2.5 * cut


def test_a_gpu_that_is_not_here_is_taken_for_one_with_bfloat16() -> None:
    """Searching holds a copy there, of half the size."""
    loading, searching = (cost_of(LlamaConfig(), "cuda").memory[stage].device for stage in ("loading", "searching"))
    assert searching > 1.5 * loading


@pytest.mark.parametrize("family", known_architectures())
def test_time_is_estimated_for_every_family(
    family: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model(family).save_pretrained(tmp_path)
    cost = verbs.estimate(tmp_path, **SMALL, ratio=0.05, round_to=1, protect_first=1, protect_last=1)
    assert cost.seconds is not None
    assert set(cost.seconds) <= set(cost.memory)
    assert all(0 <= seconds < 60 for seconds in cost.seconds.values())
    assert cost.seconds["searching"] > 0


def test_only_what_the_family_allows_is_counted(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    options = SMALL | {"ratio": 0.05, "round_to": 1, "protect_first": 1, "protect_last": 1}
    for family, fits in (("llama", True), ("gemma2", False)):
        make_model(family).save_pretrained(tmp_path / family)
        cost = verbs.estimate(tmp_path / family, timed=False, **options)
        assert ("compensating" in cost.memory) == fits
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(AdaPrunerError, match="64"):
        verbs.estimate(tmp_path / "gpt2", **options | {"seq_len": 65})


def test_the_cost_of_what_does_not_fit_is_told(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adapruner.cost._estimate.available_memory", lambda _: 0)
    options = SMALL | {"ratio": 0.05, "round_to": 1, "protect_first": 1, "protect_last": 1}
    assert verbs.estimate(model_folder, timed=False, **options).layer_wise
    assert "does not fit here" in capsys.readouterr().err


def test_where_a_model_does_not_fit_it_is_read_layer_by_layer(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(model_folder), "calibration": str(text_file), **SMALL, "protect_first": 1}
    options |= {"protect_last": 1, "round_to": 1}
    needed = {False: Memory(1000), True: Memory(600)}
    monkeypatch.setattr("adapruner.cost._estimate.estimate_memory", lambda *given: {"searching": needed[given[-1]]})

    def goes_layer_by_layer(free: int, **more: object) -> bool:
        monkeypatch.setattr("adapruner.cost._estimate.available_memory", lambda _: free)
        return prepare(PruneConfig(**options | more), RunFolder(tmp_path), None).layer_wise

    assert not goes_layer_by_layer(1300)
    assert goes_layer_by_layer(1300, layer_wise=True)
    assert goes_layer_by_layer(1000)
    with pytest.raises(AdaPrunerError, match=r"GiB are free on cpu: --layer-wise takes less"):
        goes_layer_by_layer(1000, layer_wise=False)
    with pytest.raises(AdaPrunerError, match=r"one layer at a time, where 0\.0 GiB are free"):
        goes_layer_by_layer(600)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not goes_layer_by_layer(2600)
    assert goes_layer_by_layer(1600)


def test_what_is_beside_the_gpu_has_to_fit_too() -> None:
    cost = Cost(torch.device("cuda"), torch.bfloat16, True, {"searching": Memory(1000, 5), "saving": Memory(500, 1000)})
    assert cost.fits(Memory(1150, 1150))
    assert not cost.fits(Memory(1149, 1150))
    assert not cost.fits(Memory(1150, 1149))
    assert "beside the GPU (saving)" in cost.described


def test_files_in_memory_are_free_for_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as cgroup v2 gives them."""
    monkeypatch.setattr("adapruner.cost._memory._CONTROL_GROUP", tmp_path)
    cpu = torch.device("cpu")
    everything = available_memory(cpu)
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 400\nactive_file 150\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory(cpu) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(cpu) == pytest.approx(everything, rel=0.2)


def test_inspect_prints_the_cost(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pool", "6", "--samples", "3", "--seq-len", "16", "--protect-first", "1", "--protect-last", "1"]
    with contextlib.suppress(SystemExit):
        main(["inspect", str(model_folder), "--cost", *options, "--ratio", "0.1", "--round-to", "1", "--json"])
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert list(stages) == [
        "loading",
        "reading activations",
        "measuring",
        "comparing removals",
        "searching",
        "compensating",
        "saving",
    ]
    assert all(stage["device_bytes"] > 0 for stage in stages.values())
    assert stages["searching"]["seconds"] > 0
    with pytest.raises(SystemExit):
        main(["inspect", str(model_folder), "--pool", "6"])
    assert "only go with --cost" in capsys.readouterr().err


def test_the_cost_of_query_heads(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    options = SMALL | {"head_granularity": "query-head", "head_share": 1.0, "ratio": 0.1, "round_to": 1}
    cost = verbs.estimate(tmp_path, **options, protect_first=1, protect_last=1)
    assert cost.seconds is not None
    assert cost.seconds["searching"] > 0

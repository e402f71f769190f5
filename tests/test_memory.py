"""What a run is said to need of memory, and what becomes of runs that do not fit."""

import contextlib
import gc
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import adapruner
from adapruner import AdaPrunerError, PruneConfig, families
from adapruner.budget.counts import reference_budget
from adapruner.cli import main
from adapruner.measurement.moments import StoredMoments
from adapruner.measurement.taylor import saved_activations
from adapruner.model.architecture import is_pruned, known_architectures
from adapruner.model.loading import empty_model, in_fastest_dtype, load_model, trial_dtype
from adapruner.model.places import find_model
from adapruner.run import memory, models
from adapruner.run.memory import GIB, Memory, choose_placement, estimate_memory
from adapruner.run.prune import estimate
from adapruner.structure.build import build_structure
from run_helpers import RUN_OPTIONS, flags
from tiny_families import cut_to, tiny_config

SMALL = {"pool": 6, "samples": 3, "objective_windows": 4, "seq_len": 16, "compensation_windows": 8, "trials": 4}
TINY = SMALL | {"heal": "none", "ratio": 0.05, "round_to": 1, "protect_first": 1, "protect_last": 1}


def memory_of(
    model_config: LlamaConfig,
    by_layer: bool,
    device: str = "cpu",
    count: int = 1,
    stated: int | None = None,
    **options: Any,
) -> Memory:
    model = empty_model(model_config)
    structure = build_structure(model)
    config = PruneConfig.from_options(**{"model": "x", "calibration": "c4", "heal": "none"} | options)
    budget = reference_budget(config, structure, config.ratio)
    return estimate_memory(config, model, structure, budget, [torch.device(device)] * count, by_layer, stated)


def test_saving_takes_the_memory_of_a_file():
    """Layer by layer, whatever is removed and however large the model is."""
    location = find_model(Path(__file__).parent / "configs" / "qwen3-30b-a3b")
    model = empty_model(families.open_config(location))
    structure = build_structure(model)

    def host(**options: Any) -> int:
        config = PruneConfig(model="x", calibration="c4", trials=0, ratio=0.1, layout="uniform", **options)
        budget = reference_budget(config, structure, config.ratio)
        on_gpu = [torch.device("cuda")], True, 24 * GIB, location
        return estimate_memory(config, model, structure, budget, *on_gpu).host

    for heal in ("none", "50k"):
        assert 6 * 10**9 < host(heal=heal) < 8 * 10**9
    assert host(dtype="float32") < 9 * 10**9


@pytest.mark.parametrize("family", known_architectures())
def test_saved_activations_are_what_one_layer_more_keeps(family, make_model, windows):
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


@pytest.mark.parametrize("family", ["modernbert-decoder", "nemotron_h"])
def test_saved_activations_of_families_whose_layers_are_described_otherwise(family):
    config = tiny_config(family)
    families.resolve(config)
    assert saved_activations(config, torch.float32) > 0


def test_saved_activations_of_a_pruned_model_are_counted_as_of_its_dense_model(make_model):
    dense = make_model("llama")
    pruned = cut_to(dense, lambda block: block.groups - min(block.layer, 1))
    assert is_pruned(pruned.config)
    assert saved_activations(pruned.config, torch.float32) == saved_activations(dense.config, torch.float32)


# Of LLaMA-7B: all parameters, those of a layer, and those outside of layers.
PARAMETERS, LAYER, OUTSIDE = 6_738_415_616, 202_383_360, 6_738_415_616 - 32 * 202_383_360


def test_a_7b_model_needs_what_its_shapes_say():
    """In bfloat16, the dense and the pruned model, of which a fifth is removed, and what a layer is corrected with; or
    the dense model and the states of much text."""
    llama = LlamaConfig(dtype="bfloat16")
    whole = memory_of(llama, False, "cuda", heal="none", trials=8)
    assert whole.weights == pytest.approx(2 * 1.8 * PARAMETERS, rel=1e-3)
    assert whole.largest == "second moments"
    assert whole.term == 4 * (4 * 11_008**2 + 3 * 4096 * 11_008)
    text = memory_of(llama, False, "cuda", heal="none", compensation_windows=20_000)
    assert (text.weights, text.largest) == (2 * PARAMETERS, "compensation_windows")
    assert text.term == 20_000 * 128 * 4096 * 2
    # All statistics of 64 samples: three for each vector (four attention and three feed-forward matrices) and two for
    # each input of a row-wise projection.
    pool = 4 * 32 * (3 * (4 * 4096 + 3 * 11_008) + 2 * (4096 + 11_008))
    assert memory_of(llama, False, "cuda", heal="none", trials=8, pool=1024).host == 1024 * pool
    # Files of 2 GB, twice; layer by layer with a layer, while pruned layers stay on disk.
    assert whole.host == memory_of(llama, False, "cuda").host == 4 * 10**9 > 64 * pool
    by_layer = memory_of(llama, True, "cuda", trials=8)
    assert (by_layer.weights, by_layer.largest) == (2 * (OUTSIDE + LAYER), "second moments")
    assert by_layer.term == 4 * (8 * 11_008**2 + 4 * 4096 * 11_008)
    assert by_layer.host == whole.host + 2 * LAYER


def test_a_gpu_that_is_not_here_is_taken_for_one_with_bfloat16():
    """Trials run a copy there, of half the size."""
    weights = memory_of(LlamaConfig(), False, "cuda").weights
    assert weights == pytest.approx((4 + 2 + 4 * 0.8) * PARAMETERS, rel=1e-3)


def test_a_context_that_the_model_does_not_have_is_refused(make_model, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(AdaPrunerError, match="64"):
        estimate(tmp_path, **TINY | {"seq_len": 65})


def test_the_training_takes_what_the_memory_allows(tmp_path):
    """All weights and their gradients in float32, and two moments of each; or those of adapters."""
    llama = LlamaConfig(dtype="bfloat16")
    alone, full, lora, scales = (
        memory_of(llama, False, "cuda", stated=stated, compensation_windows=64, **options)
        for stated, options in (
            (None, {"layout": "uniform"}),
            (200 * GIB, {"heal": "1M", "layout": "uniform"}),
            (80 * GIB, {"heal": "1M", "layout": "uniform"}),
            (31 * GIB, {"heal": "1M", "layout": "uniform"}),
        )
    )
    assert {full.largest, lora.largest} == {"training after the cut"}
    assert full.term > 16 * 0.8 * PARAMETERS
    assert alone.device <= scales.device < lora.device < full.device
    llama.save_pretrained(tmp_path)
    assert estimate(tmp_path, "48GB", device="auto", heal="1M").fits


@pytest.fixture
def choose(model_folder, monkeypatch):
    """Chooses for a model that needs 800 bytes as a whole and 500 layer by layer."""
    needed = {False: Memory(700, 100, "second moments"), True: Memory(400, 100, "seq_len")}
    monkeypatch.setattr(memory, "estimate_memory", lambda *given: needed[given[5]])
    model = empty_model(load_model(find_model(str(model_folder))).config)

    def choose(total: int, free: int, streamable: bool = True, **options: object) -> bool:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=free))
        monkeypatch.setattr(memory, "_CONTROL_GROUP", Path("nowhere"))
        config = PruneConfig(model="x", **options)
        structure = build_structure(model)
        budget = reference_budget(PruneConfig(model="x", **TINY), structure, 0.2)
        placement = choose_placement(config, model, structure, budget, [torch.device("cpu")], streamable)
        assert placement.devices == (torch.device("cpu"),)
        return placement.layer_wise

    return choose


def test_the_memory_of_the_machine_decides_and_not_what_is_free(choose):
    assert [choose(1100, free) for free in (900, 1000)] == [False, False]
    assert [choose(1000, free) for free in (600, 1000)] == [True, True]
    assert choose(10_000, 10_000, layer_wise=True)
    assert not choose(1000, 900, streamable=False)


def test_what_does_not_fit_is_refused(choose):
    sizes = r"Not enough memory: .* GiB of weights \+ .* GiB of {} = .* GiB are needed on cpu, .* are free"
    with pytest.raises(
        AdaPrunerError, match=sizes.format("second moments") + r"\. Try `layer_wise` or `dtype` bfloat16;"
    ):
        choose(10_000, 700)
    assert not choose(10_000, 700, layer_wise=False, ignore_memory=True)
    with pytest.raises(
        AdaPrunerError, match=sizes.format("`seq_len`") + r"\. Try a smaller `seq_len` or `dtype` bfloat16;"
    ):
        choose(1000, 400)
    with pytest.raises(AdaPrunerError, match=r"second moments = .*\. Try `dtype` bfloat16;"):
        choose(1000, 700, streamable=False)


def test_layers_are_on_as_few_devices_as_hold_them(model_folder, monkeypatch):
    """A model that needs 800 bytes, 100 of them on every device, or 150 layer by layer, on four devices."""
    monkeypatch.setattr(
        memory, "estimate_memory", lambda *given: Memory(150 if given[5] else 100 + 700 // len(given[4]), 0, "seq_len")
    )
    model, devices = (
        empty_model(load_model(find_model(str(model_folder))).config),
        [torch.device("cuda", n) for n in range(4)],
    )
    structure = build_structure(model)
    budget = reference_budget(PruneConfig(model="x", **TINY), structure, 0.2)

    def choose(total: int, streamable: bool = True, **options: object) -> tuple[int, bool]:
        monkeypatch.setattr(memory, "total_and_free", lambda _: (total, total))
        config = PruneConfig(model="x", **options)
        placement = choose_placement(config, model, structure, budget, devices, streamable)
        assert placement.devices == tuple(devices[: len(placement.devices)])
        return len(placement.devices), placement.layer_wise

    # The memory that has three quarters of it for 800, 450, 333 and 275 bytes.
    assert [choose(total) for total in (1068, 600, 444, 367, 365)] == [(n, False) for n in (1, 2, 3, 4)] + [(1, True)]
    assert choose(1068, layer_wise=True) == (1, True)
    assert choose(600, layer_wise=False) == (2, False)
    assert choose(1068, device="cuda:0,cuda:1,cuda:2,cuda:3") == (4, False)
    assert choose(365, streamable=False) == (4, False)
    with pytest.raises(AdaPrunerError, match=r"are needed on cuda:0, cuda:1, cuda:2, cuda:3, .* are free"):
        choose(200, streamable=False)


def test_spread_weights_are_estimated_for_the_device_that_has_most():
    """The share of the dense and of the pruned model, and a layer of each beyond it; or what is outside of layers."""
    llama = LlamaConfig(dtype="bfloat16")
    one, two, many = (memory_of(llama, False, "cuda", count, compensation_windows=768).weights for count in (1, 2, 100))
    assert two == pytest.approx(one / 2 + 2 * 2 * LAYER, rel=1e-6)
    # Of so many devices, moments need more than the pruned model: the dense one is counted alone.
    assert many == 2 * (OUTSIDE + LAYER)


def test_processes_on_one_machine_share_its_memory(choose, monkeypatch):
    launched = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert not choose(2200, 2200)
    assert choose(2000, 2000)


def test_a_container_bounds_memory(tmp_path, monkeypatch):
    """Numbers as cgroup v2 gives them; cached files are free."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    total, _ = memory.total_and_free(cpu)
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 400\nactive_file 150\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.total_and_free(cpu) == (1000, 650)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total_and_free(cpu)[0] == total


@pytest.mark.skipif(sys.platform != "linux", reason="has no such limits")
@pytest.mark.parametrize(("kind", "field"), [("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")])
def test_a_limit_of_the_process_bounds_memory(kind, field):
    process, number = psutil.Process(), getattr(psutil, kind)
    before, limit = process.rlimit(number), getattr(process.memory_info(), field) + GIB
    process.rlimit(number, (limit, before[1]))
    try:
        total, free = memory.total_and_free(torch.device("cpu"))
    finally:
        process.rlimit(number, before)
    assert total == limit
    assert 0.9 * GIB < free <= GIB


def test_inspect_prints_memory(model_folder, capsys):
    def printed(*more: str, **changes: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["inspect", str(model_folder), "--cost", *flags(TINY | changes), *more])
        return capsys.readouterr().out

    needed = json.loads(printed("--json"))
    assert needed["device_bytes"] == needed["weights_bytes"] + needed["term_bytes"] > needed["weights_bytes"] > 0
    assert needed["host_bytes"] == 0
    first, second = printed().splitlines()
    assert re.fullmatch(r"memory: \d\S+ GiB of weights \+ .* GiB of .* = .* GiB on cpu", first)
    assert second == f"{model_folder} fits this machine: yes, all layers in memory"
    assert json.loads(printed("--json", heal="2k"))["largest"] == "training after the cut"
    small = {"ratio": 0.05, "round_to": 1, "protect_first": 1, "protect_last": 1}
    quick = estimate(model_folder, effort="quick", **small).memory
    assert quick == estimate(model_folder, heal="none", compensation_windows=192, **small).memory
    assert quick != estimate(model_folder, **small).memory
    with pytest.raises(SystemExit):
        main(["inspect", str(model_folder), "--pool", "6"])


def test_inspect_says_if_a_model_fits(tmp_path, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 48, "vocab_size": 1000}
    LlamaConfig(**sizes, num_attention_heads=8).save_pretrained(tmp_path)
    peak = estimate(tmp_path, device="cuda", **TINY).memory.device

    def verdict(*arguments: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["inspect", str(tmp_path), "--cost", *flags(TINY), *arguments])
        return capsys.readouterr().out.splitlines()[-1].removeprefix(f"{tmp_path} ")

    assert verdict("--device", "cuda").startswith("fits: unknown")
    stated = "--gpu-memory"
    assert verdict().startswith("fits this machine: yes, all layers in memory")
    assert verdict(stated, "24GB").startswith("fits 24GB: yes, all layers in memory")
    # A quarter is left free, unless one layer at a time is in memory.
    assert "yes, one layer at a time in memory, which leaves out the text" in verdict(stated, f"{1.2 * peak:.0f}B")
    assert "spread over 2 devices, where healing trains scales alone" in verdict(stated, f"2x{1.2 * peak:.0f}B")
    assert re.search(
        r"fits 1MiB: no\. Not enough memory: .* are needed on cuda:0, .*; --ignore-memory", verdict(stated, "1MiB")
    )
    for wrong in ("24", "much", "0x24GB"):
        with pytest.raises(AdaPrunerError, match="such as 24GB or 4x80GB"):
            estimate(tmp_path, wrong)
    with pytest.raises(AdaPrunerError, match="leave `device` out"):
        estimate(tmp_path, "24GB", device="cpu")


def test_trials_run_in_one_dtype_layer_by_layer_and_not(model_folder, windows, monkeypatch):
    """As on a processor that multiplies bfloat16."""
    monkeypatch.setattr("adapruner.model.loading.computes_bfloat16_natively", lambda _: True)
    whole, streamed = (load_model(find_model(str(model_folder)), layer_wise=way) for way in (False, True))
    assert trial_dtype(whole.dtype, whole.device) == torch.bfloat16
    copies = [in_fastest_dtype(model) for model in (whole, streamed)]
    with torch.no_grad():
        first, second = (copy(windows).logits for copy in copies)
        assert first.dtype == second.dtype == torch.bfloat16
        assert torch.equal(first, second)
        # The models themselves are left as they are.
        assert torch.equal(whole(windows).logits, streamed(windows).logits)
    assert streamed.dtype == torch.float32


def test_no_moments_are_held_when_the_model_is_cut(model_folder, text_file, tmp_path, monkeypatch):
    alive = []
    cut = models.prune_model

    def counting(*arguments: Any) -> Any:
        alive.append(sum(type(one) is StoredMoments and bool(one._held) for one in gc.get_objects()))
        return cut(*arguments)

    monkeypatch.setattr(models, "prune_model", counting)
    gc.disable()
    try:
        adapruner.prune(str(model_folder), output=tmp_path / "a", calibration=str(text_file), **RUN_OPTIONS)
    finally:
        gc.enable()
    assert alive
    assert set(alive) == {0}

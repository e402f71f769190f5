"""Weights that files hold in FP8 or MXFP4."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.checkpoint import save_checkpoint
from adapruner.families import open_config
from adapruner.families.inference import random_model
from adapruner.model.codes import from_fp8
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from run_helpers import QUICK, config_with_experts
from tiny_families import tiny_config

CODES = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
# Experts are ranked without a search.
OTHERS = ("ratio", "pool", "samples", "objective_windows", "protect_first", "protect_last")
OPTIONS = {name: value for name, value in QUICK.items() if name not in OTHERS} | {"trials": 0}
NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (-(-size // 128) for size in weight.shape)
    blocks = torch.zeros(rows * 128, columns * 128)
    blocks[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = blocks.view(rows, 128, columns, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return codes[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scales


def in_codes(dense: Path, folder: Path, method: str) -> Path:
    """A folder like another, whose weights are in codes: the nearest ones in FP8, any in MXFP4."""
    tensors = dict[str, Tensor]()
    draw = torch.Generator().manual_seed(0)
    for name, weight in load_file(dense / "model.safetensors").items():
        if method == "fp8" and name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(weight)
        elif method == "mxfp4" and name.endswith("_proj"):
            experts, inputs, outputs = weight.shape
            size = (experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, size, generator=draw).byte()
            tensors[f"{name}_scales"] = torch.randint(119, 124, size[:3], generator=draw).byte()
        else:
            tensors[name] = weight
    folder.mkdir()
    for file in dense.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": CODES[method]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_numbers(folder: Path) -> PreTrainedModel:
    """What transformers makes of codes."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    options = {"weight_block_size": [128, 128]} if method == "fp8" else {}
    how = (FineGrainedFP8Config if method == "fp8" else Mxfp4Config)(dequantize=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)


METHODS = {"qwen3_moe": "fp8", "deepseek_v3": "fp8", "gpt_oss": "mxfp4"}
WITH_DENSE_LAYERS = pytest.mark.parametrize("coded", METHODS, indirect=True)


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def coded(request, tokenizer, tmp_path):
    family, method = request.param, METHODS[request.param]
    config = tiny_config(family)
    if method == "fp8":  # several blocks in a matrix
        config.hidden_size = config.moe_intermediate_size = 256
    save_checkpoint(random_model(config).bfloat16(), tokenizer, tmp_path / "dense")
    return in_codes(tmp_path / "dense", tmp_path / "coded", method)


@WITH_DENSE_LAYERS
def test_codes_are_the_numbers_that_transformers_reads(coded, windows):
    location = find_model(coded)
    open_config(location)
    with torch.no_grad():
        logits = as_numbers(coded)(windows).logits
        for layer_wise in (False, True):
            assert torch.equal(load_model(location, layer_wise=layer_wise)(windows).logits, logits)


def test_kept_experts_keep_their_codes(coded, text_file, windows, tmp_path):
    """The whole run, layer by layer; transformers reads the folder as the original without these experts."""
    result = adapruner.prune(
        str(coded), output=tmp_path / "run", calibration=str(text_file), ratio=0.195, layout="uniform", **OPTIONS
    )
    kept = {block.layer: block.kept for block in result.plan.blocks if len(block.kept) < block.groups}
    before, after = (load_file(folder / "model.safetensors") for folder in (coded, result.model_folder))
    assert len(kept) == 4
    config = json.loads((result.model_folder / "config.json").read_text())
    assert config == config_with_experts(coded, 3)
    assert config["quantization_config"] == CODES[METHODS[config["model_type"]]]
    assert len(after) <= len(before)
    for name, tensor in after.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        own = kept[int(layer[1])] if layer else ()
        number = NUMBER.search(name)
        source = before[NUMBER.sub(str(own[int(number[0])]), name) if number else name]
        if source.shape != tensor.shape:
            source = source[list(own)]
        assert source.dtype == tensor.dtype
        assert torch.equal(source.view(torch.uint8), tensor.view(torch.uint8))
    original = as_numbers(coded)
    cut = prune_model(original, build_structure(original), result.plan)
    with torch.no_grad():
        assert torch.equal(as_numbers(result.model_folder)(windows).logits, cut(windows).logits)


@WITH_DENSE_LAYERS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_codes_that_cannot_stay_become_numbers(coded, dtype, text_file, tmp_path, capsys):
    """Channels are cut too, which no scale survives, or another dtype is asked for."""
    others = {"ratio": 0.1, "expert_granularity": "channel"}
    if dtype == "float32" or "deepseek_v3" in (coded / "config.json").read_text():  # whose dense layer loses channels
        others = {"ratio": 0.195, "layout": "uniform"}
    options = OPTIONS | others | {"dtype": dtype, "calibration": str(text_file)}
    result = adapruner.prune(str(coded), output=tmp_path / "run", **options)
    assert f"are in FP8 or MXFP4; those of the pruned model are in {dtype}" in capsys.readouterr().err
    dtypes = [tensor.dtype for tensor in load_file(result.model_folder / "model.safetensors").values()]
    # What routers keep in float32 remains.
    assert set(dtypes) <= {getattr(torch, dtype), torch.float32}
    assert dtypes.count(getattr(torch, dtype)) > len(dtypes) / 2


def test_training_on_request_writes_numbers(coded, text_file, tmp_path, capsys):
    options = OPTIONS | {"ratio": 0.195, "layout": "uniform", "calibration": str(text_file), "heal": "1k"}
    result = adapruner.prune(str(coded), output=tmp_path / "run", **options)
    assert result.result.healing is not None
    noted = "are in FP8 or MXFP4; those of the pruned model are in bfloat16" in capsys.readouterr().err
    dtypes = {tensor.dtype for tensor in load_file(result.model_folder / "model.safetensors").values()}
    assert noted == (dtypes <= {torch.bfloat16, torch.float32})
    assert noted == (result.result.healing.record is not None)


def test_a_size_is_that_of_the_files(coded, text_file, tmp_path):
    """In codes: in numbers, a model of the size that is asked for would have lost half of itself."""
    dense = (coded / "model.safetensors").stat().st_size
    options = {name: value for name, value in OPTIONS.items() if name != "heal"} | {"layout": "uniform"}
    options |= {"calibration": str(text_file), "size": f"{round(0.9 * dense)}B"}
    shown = adapruner.run.prune.preview(str(coded), output=tmp_path / "run", **options)
    result = adapruner.prune(str(coded), output=tmp_path / "run", **options)
    made = (result.model_folder / "model.safetensors").stat().st_size
    assert 0.5 * dense < made <= 0.9 * dense
    # The header and what lies between tensors are not weights.
    assert shown.model_bytes <= made <= 1.1 * shown.model_bytes
    assert dense - made == pytest.approx(result.result.removed_bytes, rel=0.1)
    with pytest.raises(AdaPrunerError, match=rf"fit already, in {dense / 1e6:.1f}"):
        adapruner.prune(str(coded), output=tmp_path / "large", **options | {"size": f"{2 * dense}B"})


def test_a_tensor_of_an_expert_that_is_no_weight_is_refused(coded, text_file, tmp_path):
    """Copied, it would be that of another expert."""
    tensors = load_file(coded / "model.safetensors")
    experts = [name for name in tensors if NUMBER.search(name) and name.endswith(".weight")]
    if not experts:
        pytest.skip("experts are stacked")
    tensors[experts[0].replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, coded / "model.safetensors", {"format": "pt"})
    options = OPTIONS | {"ratio": 0.195, "layout": "uniform", "calibration": str(text_file)}
    with pytest.raises(AdaPrunerError, match=r"1 tensors of single experts that belong to no weight .*input_scale"):
        adapruner.prune(str(coded), output=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "windows.safetensors").exists()


def test_blocks_at_the_edge_have_scales_of_their_own():
    weight = torch.randn(200, 130)
    codes, scales = fp8(weight)
    read = from_fp8(codes, scales)
    for row, column in ((0, 0), (199, 0), (0, 129), (199, 129), (127, 128)):
        expected = codes[row, column].float() * scales[row // 128, column // 128]
        assert read[row, column] == expected.bfloat16()


def test_other_codes_are_refused(coded):
    path = coded / "config.json"
    config = json.loads(path.read_text())
    for odd in ({"quant_method": "fp8", "weight_block_size": None}, {"quant_method": "compressed-tensors"}):
        path.write_text(json.dumps(config | {"quantization_config": odd}))
        with pytest.raises(AdaPrunerError, match="quantized"):
            adapruner.inspect(str(coded))

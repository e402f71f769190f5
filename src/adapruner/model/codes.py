"""Weights that files hold in eight or four bits, as numbers of a model: mixtures are published in FP8 and MXFP4, some
in nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Rows and columns of a matrix in FP8 that share a scale, as in DeepSeek-V3 and whatever followed it.
FP8_BLOCK = 128
# The values of four bits (E2M1) by their code, OCP Microscaling Formats 1.0, 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def are_readable(quantization: Mapping[str, Any]) -> bool:
    """True for the `quantization_config` of files whose codes are read here."""
    if quantization.get("quant_method") == "fp8":
        return quantization.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]
    return quantization.get("quant_method") == "mxfp4"


def from_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """[out_features, in_features] in bfloat16, of codes of the same shape in float8_e4m3fn and of one scale for each
    block, [out_features / 128, in_features / 128], rounded up."""
    rows, columns = codes.shape
    of_rows = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows]
    return (codes.float() * of_rows.repeat_interleave(FP8_BLOCK, 1)[:, :columns]).bfloat16()


def from_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """[experts, in_features, out_features] in bfloat16, as gpt-oss has them in memory, of codes [experts, out_features,
    in_features / 32, 16] in uint8, two in a byte with the first in the low bits, and of a binary exponent for each 32,
    [experts, out_features, in_features / 32] in uint8, to which 127 is added."""
    positive = torch.tensor(_E2M1)
    by_code = torch.cat([positive, -positive])
    experts, out_features, groups, bytes_of_group = codes.shape
    numbers = torch.empty(experts, 2 * groups * bytes_of_group, out_features, dtype=torch.bfloat16)
    # One expert at a time: all that is between takes several times the memory of the numbers.
    for own, codes_of_one, scales_of_one in zip(numbers, codes, scales, strict=True):
        values = torch.stack([by_code[(codes_of_one & 15).int()], by_code[(codes_of_one >> 4).int()]], dim=-1)
        own.copy_(torch.ldexp(values.flatten(-2), scales_of_one.int().unsqueeze(-1) - 127).flatten(-2).T)
    return numbers

"""Comparing removals in float32, as AdaPruner does, against float64.

    python benchmarks/elimination.py --measured runs/measured

For some blocks of a measured run: the rank correlation of the errors of removal, the kept groups that are the same, the
time here, and the work on a modelled card that is 64 times as slow in float64. The work is counted in operations:
products by their shapes, factorizations by n³/3, and what remains by the numbers that it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cyclopts import run
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from adapruner.measurement import InputMoments, factorize
from adapruner.measurement._reduction import row_wise_weights
from adapruner.measurement._removal import _eliminate, _with_inverse
from adapruner.models import find_model, load_model
from adapruner.structure import build_structure
from machine import describe, seconds
from measured import Measured

SLOWER_IN_FLOAT64 = 64
SHARES_KEPT = (0.2, 0.5, 0.8)
# Operations, in units of n³ / 3.
FACTORIZATIONS = {"linalg_cholesky_ex": 1, "cholesky_inverse": 2}

Prepare = Callable[[Tensor, InputMoments], tuple[Tensor, Tensor]]


class Work(TorchDispatchMode):
    """Counts operations by dtype, while it lasts."""

    def __init__(self) -> None:
        # By name: mypy allows untyped calls into torch, but does not see that one through super() is.
        TorchDispatchMode.__init__(self)
        self.by_dtype = Counter[torch.dtype]()

    @property
    def of_card(self) -> int:
        """In operations in float32."""
        return sum(
            count * (SLOWER_IN_FLOAT64 if dtype == torch.float64 else 1) for dtype, count in self.by_dtype.items()
        )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, tuple) else made
        if isinstance(first, Tensor):
            name = function.overloadpacket.__name__.removesuffix("_")  # in place, the same operation
            packet = getattr(torch.ops.aten, name, None)
            if name in FACTORIZATIONS:
                count = FACTORIZATIONS[name] * len(first) ** 3 // 3
            elif name == "_linalg_solve_ex":
                count = 2 * args[0].shape[-1] * first.numel()
            elif packet in flop_registry:
                count = flop_registry[packet](*args, **(kwargs or {}), out_val=made)
            else:
                count = first.numel()
            self.by_dtype[first.dtype] += count
        return made


def in_float64(weight: Tensor, moments: InputMoments) -> tuple[Tensor, Tensor]:
    """What `_with_inverse` gives, without scaling and in float64."""
    return weight.double(), torch.cholesky_inverse(factorize(moments.second, moments.damping))


def errors_of(weight: Tensor, moments: InputMoments, width: int, prepare: Prepare) -> Tensor:
    """[groups], what each adds in the order of elimination."""
    with torch.inference_mode():
        return _eliminate(*prepare(weight, moments), width)[1]


def main(*, measured: Path, blocks: int = 20) -> None:
    """
    Args:
        measured: Folder of a run with second moments.
        blocks: How many, evenly spaced.
    """
    print(describe())
    found = Measured.read(measured)
    model = load_model(find_model(found.config.model))
    structure = build_structure(model)
    numbers = list(found.moments)
    assert numbers, f"{measured} has no second moments"
    ways: dict[str, Prepare] = {"float64": in_float64, "float32": _with_inverse}
    correlations, same, times, work = [], [], dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for number in numbers[:: max(1, len(numbers) // blocks)]:
        block, moments = structure.blocks[number], found.moments[number]
        (weight,) = row_wise_weights(model, block).float()
        errors = []
        for name, prepare in ways.items():
            eliminate = partial(errors_of, weight, moments, block.row_wise.width, prepare)
            times[name] += seconds(eliminate)
            with Work() as counted:
                errors.append(eliminate())
            work[name] += counted.of_card
        correlations.append(spearmanr(*(own.numpy() for own in errors)).statistic)
        for share in SHARES_KEPT:
            kept = [set(own.topk(round(share * block.groups)).indices.tolist()) for own in errors]
            if kept[0]:
                same.append(len(kept[0] & kept[1]) / len(kept[0]))
    print(f"{len(correlations)} blocks: rank correlation at least {min(correlations):.10f}")
    print(f"kept groups that are the same: at least {min(same):.2%}")
    print(f"seconds here: float64 {times['float64']:.2f}, float32 {times['float32']:.2f}")
    more = work["float64"] / work["float32"]
    print(f"on a card {SLOWER_IN_FLOAT64} times as slow in float64, float64 is {more:.1f} times as much work")


if __name__ == "__main__":
    run(main)

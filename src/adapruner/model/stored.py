"""Weights in safetensors files: a model whose layers are read while in use, or whose parts several processes read."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from adapruner.base.errors import AdaPrunerError
from adapruner.model.architecture import architecture_of, new_model
from adapruner.model.codes import from_fp8, from_mxfp4
from adapruner.model.layers import ReadLayer, move_resident, plain_weights, stream_layers, without_weights
from adapruner.model.places import ModelLocation

_ATTRIBUTE = "deferred"


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a safetensors file, of which parts can be read."""

    file: str
    name: str

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            weight: Tensor = opened.get_slice(self.name)[part]
        return weight


Source: TypeAlias = "StoredWeight | AssembledTensor | Tensor"


def defer(model: nn.Module, sources: Mapping[str, Source], device: torch.device, dtype: torch.dtype | None) -> None:
    """Replaces parameters by placeholders, which have a shape, a dtype and a device, but no memory of their own. Tied
    parameters stay tied.

    Args:
        sources: of the values, by the paths of the parameters.
        dtype: of the placeholders; None keeps that of each parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_identity = {
        id(parameters[path]): (source, placeholder(parameters[path], device, dtype)) for path, source in sources.items()
    }
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in by_identity:
                vars(module).setdefault(_ATTRIBUTE, {})[name], module._parameters[name] = by_identity[id(weight)]


def placeholder(weight: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter of one number in memory."""
    number = torch.zeros((), dtype=dtype or weight.dtype, device=device)
    return nn.Parameter(number.expand(weight.shape), weight.requires_grad)


def deferred_by_module(model: nn.Module) -> dict[nn.Module, dict[str, Source]]:
    """The sources of parameters that are placeholders, by their names in each module; empty for other models."""
    return {module: vars(module)[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in vars(module)}


def read_parts(model: nn.Module, others: Mapping[str, Tensor], device: torch.device) -> None:
    """Gives a model that was sharded on the meta device its weights: every process reads only its part. `others` has
    the values of everything that is not deferred, by the names in the state of the model."""
    state = {}
    for path, weight in model.state_dict().items():
        parent, _, name = path.rpartition(".")
        source = vars(model.get_submodule(parent)).get(_ATTRIBUTE, {}).get(name, others.get(path))
        if not isinstance(weight, DTensor):
            state[path] = source.to(device)
            continue
        layout = weight.device_mesh, weight.placements
        shape, start = compute_local_shape_and_global_offset(weight.shape, *layout)
        local = torch.empty(shape, dtype=weight.dtype, device=device)
        if local.numel():
            local.copy_(source[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))])
        state[path] = DTensor.from_local(local, *layout, run_check=False, shape=weight.shape, stride=weight.stride())
    model.load_state_dict(state, assign=True)
    for module in deferred_by_module(model):
        del vars(module)[_ATTRIBUTE]


def read_all(model: nn.Module) -> None:
    """Reads the weights of a model whose weights are deferred, onto the CPU."""
    weights: dict[int, nn.Parameter] = {}
    placeholders = list(model.parameters())
    for module, sources in deferred_by_module(model).items():
        for name, source in sources.items():
            weight: Any = module._parameters[name]
            if id(weight) not in weights:
                values = source[tuple(slice(0, size) for size in weight.shape)].to(weight.dtype)
                weights[id(weight)] = nn.Parameter(values, weight.requires_grad)
            module._parameters[name] = weights[id(weight)]
        del vars(module)[_ATTRIBUTE]
    del placeholders  # until now, or another parameter could have the identity of one of them


_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMED_HEAD, _LAYER = re.compile(r"(^|\.)mtp[._]"), re.compile(r"(^|\.)layers\.(\d+)\.")
_FLOATING_POINT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor(StoredWeight):
    """A tensor in a safetensors file, with its shape and the name of its dtype there."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def in_files(self) -> tuple["StoredTensor", ...]:
        """What files hold of it."""
        return (self,)

    @property
    def parts(self) -> tuple[tuple[str, "StoredTensor"], ...]:
        """As of an `AssembledTensor`: it is its own part."""
        return (("", self),)

    def taken(self, opened: Mapping[str, Any]) -> Tensor:
        """The tensor, out of files that are open."""
        values: Tensor = opened[self.file].get_tensor(self.name)
        return values


@dataclass(frozen=True)
class CodedTensor(StoredTensor):
    """A tensor that files hold as codes of few bits and their scales (see `codes`); its shape and dtype are those that
    it has once it is read.

    Attributes:
        codes: in the files.
        scales: in the files, each for several codes.
        decode: makes the tensor of codes and scales.
    """

    codes: StoredTensor
    scales: StoredTensor
    decode: Callable[[Tensor, Tensor], Tensor]

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        return self.codes, self.scales

    def taken(self, opened: Mapping[str, Any]) -> Tensor:
        return self.decode(self.codes.taken(opened), self.scales.taken(opened))

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        return read_tensors({self.name: self.name}, {self.name: self})[self.name][part]


@dataclass(frozen=True)
class AssembledTensor:
    """A tensor that transformers makes of several in the files, such as all experts of a layer of one for each.

    Attributes:
        name: in the model.
        converter: what transformers does with the parts.
        config: of the model, which some converters read.
        parts: the tensors in the files with the pattern of `converter` that each fits, in the order of transformers.
    """

    name: str
    converter: WeightConverter
    config: PreTrainedConfig
    parts: tuple[tuple[str, StoredTensor], ...]

    @property
    def file(self) -> str:
        """That of the first part."""
        return self.parts[0][1].file

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        """What files hold of it."""
        return tuple(own for _, tensor in self.parts for own in tensor.in_files)

    @property
    def dtype(self) -> str:
        """That of the parts; if one has a dtype that cannot be read, that dtype."""
        return max((tensor.dtype for _, tensor in self.parts), key=lambda dtype: dtype not in _FLOATING_POINT)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._of([torch.empty(tensor.shape, device="meta") for _, tensor in self.parts]).shape)

    def taken(self, opened: Mapping[str, Any]) -> Tensor:
        """The tensor, out of files that are open."""
        return self._of([tensor.taken(opened) for _, tensor in self.parts])

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        return read_tensors({self.name: self.name}, {self.name: self})[self.name][part]

    def _of(self, values: list[Tensor]) -> Tensor:
        converter: Any = copy.deepcopy(self.converter)
        for (pattern, tensor), value in zip(self.parts, values, strict=True):
            converter.add_tensor(self.name, tensor.name, pattern, value)
        values.clear()  # the converter frees each as soon as it is copied
        made: Mapping[str, Tensor] = converter.convert(self.name, config=self.config)
        return made[self.name]


Stored = Mapping[str, StoredTensor | AssembledTensor]


def are_coded(stored: Stored) -> bool:
    """True if some tensor is a `CodedTensor`, or is made of such."""
    return any(len(own.in_files) > 1 for tensor in stored.values() for _, own in tensor.parts)


def assembled(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Stored:
    """The tensors in the files, with those of which transformers makes one tensor of a model as that one, under its
    name in the model.

    Args:
        model: may be on the meta device.
    """
    renamings, converters = _conversions(model)
    state, parts = model.state_dict(), dict[str, list[tuple[str, str]]]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and name in state:
            parts.setdefault(name, []).append((pattern, key))
    made = dict[str, StoredTensor | AssembledTensor](stored)
    for name, own in parts.items():
        converter = next(entry for entry in converters if own[0][0] in entry.source_patterns)
        tensors = tuple((pattern, stored[key]) for pattern, key in own)
        for _, key in own:
            del made[key]
        made[name] = AssembledTensor(name, converter, model.config, tensors)
    return made


def _conversions(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does with the names and tensors of the files of a model."""
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in entries if isinstance(entry, WeightConverter)]


def stored_tensors(path: str, config: PreTrainedConfig, local_files_only: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a model by their names in the files; codes with their scales are one tensor (see `CodedTensor`).

    For the arguments, see `tensors_in_files`.
    """
    stored = tensors_in_files(path, config, local_files_only)
    for scales in tuple(stored.values()):
        fp8 = stored.get(scales.name.removesuffix("_scale_inv"))
        name = scales.name.removesuffix("_scales")
        mxfp4 = stored.get(f"{name}_blocks")
        if fp8 not in (None, scales) and fp8.dtype == "F8_E4M3" and len(fp8.shape) == 2:
            coded = CodedTensor(fp8.file, fp8.name, fp8.shape, "BF16", fp8, scales, from_fp8)
        elif mxfp4 is not None and mxfp4.dtype == "U8" and len(mxfp4.shape) == 4:
            experts, out_features, groups, bytes_of_group = mxfp4.shape
            shape = experts, 2 * groups * bytes_of_group, out_features
            coded = CodedTensor(mxfp4.file, name, shape, "BF16", mxfp4, scales, from_mxfp4)
        else:
            continue
        for part in coded.in_files:
            del stored[part.name]
        stored[coded.name] = coded
    return stored


def tensors_in_files(path: str, config: PreTrainedConfig, local_files_only: bool = False) -> dict[str, StoredTensor]:
    """The tensors in the files of a model by their names there.

    Args:
        path: folder or hub id.
        config: may name the file in `transformers_weights`.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        refuse_files_elsewhere("config.json", [named])
    for name in [_WEIGHTS, _INDEX] if named is None else [named]:
        file = cached_file(path, name, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False)
        if file:
            break
    else:
        raise AdaPrunerError(f"weights are read from safetensors files, and {path!r} has none: save it as such first")
    shards = [file]
    if file.endswith(".json"):
        refuse_files_elsewhere(file, json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values())
        shards = get_checkpoint_shard_files(path, file, local_files_only=local_files_only)[0]
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                stored[name] = StoredTensor(shard, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return stored


def is_of_multi_token_head(name: str, config: PreTrainedConfig) -> bool:
    """True for a tensor, by its name in the files, of a multi-token prediction head, which transformers leaves out: its
    name has a part that begins with `mtp`, or it belongs to one of the layers that follow the last decoder layer, as
    many as the config counts."""
    if _NAMED_HEAD.search(name):
        return True
    # transformers has one name, the files of most models the other.
    count = getattr(config, "num_mtp_layers", None) or getattr(config, "num_nextn_predict_layers", None)
    layer = _LAYER.search(name)
    return bool(layer and isinstance(count, int) and 0 <= int(layer[2]) - config.num_hidden_layers < count)


def has_multi_token_head(location: ModelLocation, config: PreTrainedConfig) -> bool:
    """True if the safetensors files of a model have a multi-token prediction head."""
    names = () if location.gguf_file else stored_tensors(location.path, config)
    return any(is_of_multi_token_head(name, config) for name in names)


def dtype_in_files(stored: Stored) -> torch.dtype:
    """The dtype of the first floating-point tensor: `dtype="auto"` of transformers if the config has none."""
    dtypes = (_FLOATING_POINT.get(tensor.dtype) for tensor in stored.values())
    return next(filter(None, dtypes), torch.float32)


def read_tensors(names: Mapping[str, str], stored: Stored) -> dict[str, torch.Tensor]:
    """Tensors by their names in the model, on the CPU, mapped from the files but for those that are made of others; for
    `names`, see `names_in_files`."""
    wanted = {name: stored[key] for name, key in names.items()}
    with contextlib.ExitStack() as stack:
        files = {own.file for tensor in wanted.values() for own in tensor.in_files}
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
        return {name: tensor.taken(opened) for name, tensor in wanted.items()}


def refuse_files_elsewhere(named_in: str | Path, names: Iterable[str]) -> None:
    """Raises AdaPrunerError if a file of a model names others that are not beside it."""
    for name in names:
        if Path(name).name != name:
            raise AdaPrunerError(f"{named_in} names a file that is not beside it, {name!r}: it is not read")


def names_in_files(model: PreTrainedModel, stored: Stored) -> dict[str, str]:
    """The names in the files by the names in the state of a model, for all tensors in both: families are stored under
    older names, or without the prefix of the model inside the causal language model."""
    state, (renamings, _) = model.state_dict(), _conversions(model)

    def in_model(key: str) -> str:
        if isinstance(stored[key], AssembledTensor):
            return key
        name: str = rename_source_key(key, renamings, [], model.base_model_prefix, state)[0]
        return name

    return {name: key for key in stored if (name := in_model(key)) in state}


def are_taken_apart(model: PreTrainedModel, at_all: bool) -> bool:
    """True if transformers makes several tensors of a model out of one in the files; with `at_all`, also if it makes
    one out of several, as for experts."""
    return any(at_all or len(converter.target_patterns) > 1 for converter in _conversions(model)[1])


def has_own_output(model: PreTrainedModel, stored: Stored) -> bool:
    """True if files hold an output matrix that differs from the embedding; transformers then does not tie the two,
    whatever the config says."""
    names = names_in_files(model, stored)
    for pair in model.all_tied_weights_keys.items():
        if names.keys() >= set(pair):
            first, second = read_tensors({name: names[name] for name in pair}, stored).values()
            if not torch.equal(first, second.to(first.dtype)):
                return True
    return False


def differences(model: PreTrainedModel, names: Mapping[str, str], stored: Stored) -> dict[str, list[Any]]:
    """The tensors that do not fit the model, in the format of the report of `from_pretrained`.

    Args:
        model: may be on the meta device.
        names: see `names_in_files`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(parameters.keys() & names.keys()):
        tensor = stored[names[name]]
        if tensor.dtype not in _FLOATING_POINT:
            raise AdaPrunerError(
                f"{name} in {tensor.file} is quantized ({tensor.dtype}): take the unquantized checkpoint"
            )
    mismatched = [
        (name, stored[names[name]].shape, tuple(wanted.shape))
        for name, wanted in model.state_dict().items()
        if name in names and stored[names[name]].shape != tuple(wanted.shape)
    ]
    tied = getattr(model, "all_tied_weights_keys", {})
    elsewhere = {name for pair in tied.items() if names.keys() & pair for name in pair}
    return {
        "mismatched_keys": mismatched,
        "missing_keys": sorted(parameters.keys() - names.keys() - elsewhere),
        "unexpected_keys": sorted(stored.keys() - set(names.values())),
    }


def load_streamed(
    path: str, config: PreTrainedConfig, files: Stored, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model of a folder or hub id whose weights are in safetensors files, with only the weights outside the decoder
    layers in memory. On a CPU, weights are mapped from the files, without a copy, unless their `dtype` differs. The
    tensors in the files match the config (see `differences`)."""
    model = _without_weights(path, config, dtype)
    names = names_in_files(model, files)
    layers_prefix, wide = f"{architecture_of(config).layers}.", _kept_in_float32(model, names, dtype)

    def reader(keys: Mapping[str, str], prefix: str = "") -> ReadLayer:
        def read() -> dict[str, Tensor]:
            tensors = read_tensors(keys, files)
            kept = {name: tensors.pop(name) for name in keys if prefix + name in wide}
            return plain_weights(tensors, device, dtype) | plain_weights(kept, device, torch.float32)

        return read

    def below(prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}

    resident = reader({name: key for name, key in names.items() if not name.startswith(layers_prefix)})
    model.load_state_dict(resident(), strict=False, assign=True)
    model.tie_weights(missing_keys=model.state_dict().keys() - names.keys(), recompute_mapping=False)
    prefixes = [f"{layers_prefix}{index}." for index in range(config.num_hidden_layers)]
    stream_layers(model, [reader(below(prefix), prefix) for prefix in prefixes])
    move_resident(model, device)
    return model


def load_deferred(
    path: str, config: PreTrainedConfig, files: Stored, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model of a folder or hub id, with placeholders on a device for its weights, which are read later (see
    `defer`); otherwise as `load_streamed`."""
    model = _without_weights(path, config, dtype)
    names = names_in_files(model, files)
    model.tie_weights(missing_keys=model.state_dict().keys() - names.keys(), recompute_mapping=False)
    weights = names.keys() & dict(model.named_parameters(remove_duplicate=False)).keys()
    wide = _kept_in_float32(model, names, dtype)
    for own, of in ((names.keys() - wide, dtype), (wide, torch.float32)):
        buffers = read_tensors({name: names[name] for name in own - weights}, files)
        model.load_state_dict(plain_weights(buffers, device, of), strict=False, assign=True)
        defer(model, {name: files[names[name]] for name in own & weights}, device, of)
    move_resident(model, device)
    return model


def _kept_in_float32(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> set[str]:
    """The tensors that transformers leaves in float32, such as the biases by which a router chooses."""
    patterns = list(model._get_dtype_plan(dtype))
    return {name for name in names if patterns and build_glob_alternation(patterns)[0].search(name)}


def _without_weights(path: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights on the meta device, in evaluation mode."""
    config.dtype = dtype
    with without_weights():
        model = new_model(config)
    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.eval()
    return model

"""A model without some of its experts, written out of the files of the original: what is kept is copied byte for byte,
in its dtype and with its scales, and the model is never in memory."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.plan import BlockPlan, PruningPlan, make_plan
from adapruner.checkpoint import add_older_keys, index_files
from adapruner.model.architecture import is_pruned
from adapruner.model.config import find_wrapper
from adapruner.model.loading import empty_model, is_streamable
from adapruner.model.places import ModelLocation
from adapruner.model.stored import (
    StoredTensor,
    assembled,
    is_of_multi_token_head,
    names_in_files,
    read_tensors,
    stored_tensors,
    tensors_in_files,
)
from adapruner.structure.blocks import Block, Structure
from adapruner.surgery import kept_indices

# The number of an expert in the names of its tensors: the last one there is.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)(?!.*\.\d+\.)")


@dataclass(frozen=True)
class _Copied:
    """A tensor of a new file: a tensor of an old one, or some indices of an axis of it."""

    source: StoredTensor
    axis: int = 0
    kept: Tensor | None = None

    @property
    def bytes(self) -> int:
        shape, bits = list(self.source.shape), re.search(r"\d+", self.source.dtype)  # as in F8_E4M3
        if self.kept is not None:
            shape[self.axis] = len(self.kept)
        return math.prod(shape) * int(bits[0] if bits else 8) // 8


def fields_without_experts(structure: Structure, counts: Sequence[int]) -> dict[str, Any] | None:
    """The fields of the config of a model whose layers keep so many groups, if all keep the same number of experts,
    fewer than they have, and everything else; otherwise None.

    Args:
        counts: by block.
    """
    pairs = list(zip(structure.blocks, counts, strict=True))
    if any(count < block.groups for block, count in pairs if block.kind != "experts"):
        return None
    if all(count == block.groups for block, count in pairs):
        return None
    first, *others = [block.config_fields(count) for block, count in pairs if block.kind == "experts"]
    return first if all(own == first for own in others) else None


def are_copyable(location: ModelLocation, config: PreTrainedConfig) -> bool:
    """True if tensors of a model can be copied out of its files one by one, and those are all of the model."""
    return not is_pruned(config) and find_wrapper(location) is None and is_streamable(location, config)


def copied_bytes(
    location: ModelLocation, config: PreTrainedConfig, structure: Structure, counts: Sequence[int]
) -> tuple[int, int] | None:
    """Bytes of the tensors in the files of a model, and in those of the copy whose blocks keep so many groups; None if
    it cannot be copied (see `copies_without_experts`)."""
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    if (copied := _copy(location, config, structure, plan)) is None:
        return None
    dense = _in_files(location, config)
    return sum(own.bytes for own in dense.values()), sum(own.bytes for own in copied.tensors.values())


def copies_without_experts(
    location: ModelLocation, config: PreTrainedConfig, structure: Structure, plan: PruningPlan
) -> Callable[[PreTrainedModel, Path, str], None] | None:
    """What writes weights, config and generation config of a model without the experts that a plan removes, as
    `save_checkpoint` calls it; None if they cannot be copied: more than experts is removed, layers keep different
    numbers, or the files do not hold experts one by one or stacked.

    Args:
        config: of the model.
    """
    copied = _copy(location, config, structure, plan)
    if copied is None:
        return None
    smaller = copy.deepcopy(config)
    for name, value in copied.fields.items():
        setattr(smaller, name, value)

    def write(model: PreTrainedModel, folder: Path, shard_size: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(copied.tensors, folder, shard_size)
        smaller.save_pretrained(folder)
        add_older_keys(folder / "config.json")
        model.generation_config.save_pretrained(folder)

    return write


class _Copy(NamedTuple):
    """The tensors of new files by their names there, and the fields of the config that differ."""

    tensors: dict[str, _Copied]
    fields: dict[str, Any]


def _copy(location: ModelLocation, config: PreTrainedConfig, structure: Structure, plan: PruningPlan) -> _Copy | None:
    fields = fields_without_experts(structure, [len(block.kept) for block in plan.blocks])
    if fields is None or not are_copyable(location, config):
        return None
    pairs = zip(structure.blocks, plan.blocks, strict=True)
    tensors = _tensors(location, config, [pair for pair in pairs if pair[0].kind == "experts"])
    if tensors is None:
        return None
    # Codes are copied with what says how to read them.
    stated, _ = PreTrainedConfig.get_config_dict(location.path)
    if "quantization_config" in stated:
        fields["quantization_config"] = stated["quantization_config"]
    return _Copy(tensors, fields)


def _tensors(
    location: ModelLocation, config: PreTrainedConfig, cut: list[tuple[Block, BlockPlan]]
) -> dict[str, _Copied] | None:
    """The tensors of the new files by their names there; None if experts are neither stored one by one nor stacked."""
    model = empty_model(config)
    stored = assembled(model, stored_tensors(location.path, config))
    keys = names_in_files(model, stored)
    copied = _in_files(location, config)
    renumbered, places = dict[str, _Copied](), set[str]()
    for block, own in cut:
        for parameter, slices in block.slices_by_parameter.items():
            kept = kept_indices(own, slices, own.groups)[0]
            tensor, axis = stored[keys[parameter]], slices[0].stored_axis
            by_pattern: dict[tuple[str, int], list[StoredTensor]] = {}
            for pattern, part in tensor.parts:
                for number, held in enumerate(part.in_files):
                    by_pattern.setdefault((pattern, number), []).append(held)
            for parts in by_pattern.values():
                if len(parts) == own.groups > 1:
                    for expert in parts:
                        del copied[expert.name]
                        places.add(_before_number(expert.name))
                    for new, old in enumerate(kept.tolist()):
                        renumbered[_NUMBER.sub(str(new), parts[old].name)] = _Copied(parts[old])
                elif len(parts) == 1 and parts[0].shape[axis] == own.groups:
                    copied[parts[0].name] = _Copied(parts[0], axis, kept)
                else:
                    return None
    if beside := [name for name in copied if _before_number(name) in places]:
        raise AdaPrunerError(
            f"{location.path} has {len(beside)} tensors of single experts that belong to no weight of the model, such"
            f" as {min(beside)}: it is not known what to do with them once experts are removed"
        )
    return copied | renumbered


def _in_files(location: ModelLocation, config: PreTrainedConfig) -> dict[str, _Copied]:
    """All tensors in files but those of multi-token prediction heads."""
    raw = tensors_in_files(location.path, config)
    return {name: _Copied(tensor) for name, tensor in raw.items() if not is_of_multi_token_head(name, config)}


def _before_number(name: str) -> str:
    """The name of a tensor up to the number of its expert."""
    return _NUMBER.split(name)[0]


def _write_shards(tensors: Mapping[str, _Copied], folder: Path, shard_size: str) -> None:
    """Writes tensors in files of at most so many bytes each, with an index if there are several."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda copied: copied.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        own = {name: tensors[name] for name in names}
        values = read_tensors({name: name for name in own}, {name: copied.source for name, copied in own.items()})
        for name, copied in own.items():
            if copied.kept is not None:
                values[name] = values[name].index_select(copied.axis, copied.kept)
        save_file(values, folder / file, {"format": "pt"})
    index_files(folder)

"""Families that nobody has described: found out from a tiny model, proven on it, and remembered."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from transformers import PreTrainedConfig

from adapruner.conformance import prove
from adapruner.errors import AdaPrunerError
from adapruner.files import write_atomically
from adapruner.models import Architecture, infer_architecture, quiet_transformers, tiny_config
from adapruner.progress import Reporter

# Changes when families are inferred or proven in another way.
_FORMAT = 4
# What configs say of the files that they come with.
_OF_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")

# For this process: another version of this package may be able to prune it.
_refused: dict[Path, str] = {}


@torch.inference_mode(False)  # inference runs a model backwards, whatever the caller does
def describe(config: PreTrainedConfig) -> Architecture:
    """The architecture of the stock model of a config, inferred and proven; taken from the cache of this user where it
    was before, with the same version of transformers.

    Raises:
        AdaPrunerError: it cannot be pruned; with the reason.
    """
    file = _file(config)
    if refusal := _refused.get(file):
        raise AdaPrunerError(refusal)
    with suppress(OSError, ValueError):
        return Architecture.model_validate_json(file.read_bytes())
    try:
        with Reporter().stage(f"checking how {config.model_type} is built"), quiet_transformers():
            architecture = prove(config, infer_architecture(config))
    except AdaPrunerError as error:
        _refused[file] = str(error)
        raise
    # A cache that cannot be written is no cache.
    with suppress(OSError, AdaPrunerError):
        file.parent.mkdir(parents=True, exist_ok=True)
        content = architecture.model_dump_json(indent=2)
        write_atomically(file, lambda partial: partial.write_text(content, encoding="utf-8"))
    return architecture


def _file(config: PreTrainedConfig) -> Path:
    try:
        tiny = tiny_config(config).to_dict()
    except Exception:  # whatever a config class raises over sizes; inference says it
        tiny = config.to_dict()
    built = {name: value for name, value in tiny.items() if name not in _OF_FILES}
    about = [_FORMAT, transformers.__version__, type(config).__name__, built]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return Path(constants.HF_HOME) / "adapruner" / "families" / f"{config.model_type}-{key[:16]}.json"

"""Families that no file describes: inferred from a tiny model, proven on it, and remembered.

This is done once, when a model is opened by a command or a run.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from transformers import PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import write_text
from adapruner.base.progress import Reporter
from adapruner.families.inference import infer_architecture, tiny_config
from adapruner.families.proof import prove, prove_around
from adapruner.model.architecture import (
    Architecture,
    architecture_of,
    family_named,
    has_causal_model,
    known_architectures,
    remember_family,
    stock_config,
)
from adapruner.model.config import FILE_FIELDS, check_config, find_wrapper, load_config
from adapruner.model.loading import load_model
from adapruner.model.places import ModelLocation, quiet_transformers, reported_as_unloadable

# Changes when families are inferred or proven in another way.
_FORMAT = 6

# For this process only: another version of this package may be able to prune the family.
_refused: dict[Path, str] = {}
# Types of multimodal models that read text as their decoders do, which are of a family, for this process.
_proven: set[tuple[str, Path]] = set()


def open_config(location: ModelLocation) -> PreTrainedConfig:
    """The config of a model; its family is known to this process from then on, if it can be pruned."""
    config = load_config(location)
    with reported_as_unloadable(location):  # the config of the model refuses to give fields in which layers differ
        learn(config)
        check_config(config, location)
        if wrapper := find_wrapper(location):
            key = (wrapper.config.model_type, _file(stock_config(config)))
            if key not in _proven:
                family = family_named(config.model_type)
                with torch.inference_mode(False):
                    prove_around(wrapper, config, family.layouts if family else ())
                _proven.add(key)
    return config


def open_model(
    location: ModelLocation, dtype: str = "auto", device: str = "auto", layer_wise: bool = False, deferred: bool = False
) -> PreTrainedModel:
    """Loads a model as `model.loading.load_model` does, after `open_config`."""
    open_config(location)
    return load_model(location, dtype, device, layer_wise, deferred)


def resolve(config: PreTrainedConfig) -> Architecture:
    """The architecture of the family of a config, also of a model whose layers differ: from a file, or inferred and
    proven.

    Raises:
        AdaPrunerError: the family cannot be pruned, or the model is quantized; with the reason.
    """
    learn(config)
    return architecture_of(config)


def learn(config: PreTrainedConfig) -> None:
    """Infers and proves the family of a config if no file describes it. From then on, `architecture_of` returns
    its architecture, or raises with the reason why it cannot be pruned."""
    model_type = config.model_type
    if model_type in known_architectures() or getattr(config, "quantization_config", None):
        return
    if config.is_encoder_decoder or config.get_text_config() is not config or not has_causal_model(model_type):
        return
    remember_family(model_type, _describe(stock_config(config)))


@torch.inference_mode(False)  # inference needs backward passes, also inside inference_mode
def _describe(config: PreTrainedConfig) -> Architecture | str:
    """The architecture of the stock model of a config, inferred and proven, or the reason why it cannot be pruned. Read
    from the cache of this user if it was inferred before with the same version of transformers."""
    file = _file(config)
    if refusal := _refused.get(file):
        return refusal
    with suppress(OSError, ValueError):
        return Architecture.model_validate_json(file.read_bytes())
    try:
        with Reporter().stage(f"checking how {config.model_type} is built"), quiet_transformers():
            architecture = prove(config, infer_architecture(config))
    except AdaPrunerError as error:
        return _refused.setdefault(file, str(error))
    except Exception as error:  # anything that an unusual model class raises
        return _refused.setdefault(
            file, f"the architecture of a {config.model_type} could not be inferred: {reason(error)}"
        )
    # The cache is optional.
    with suppress(OSError, AdaPrunerError):
        write_text(file, architecture.model_dump_json(indent=2))
    return architecture


def _file(config: PreTrainedConfig) -> Path:
    """The file in the cache for the family of a config."""
    try:
        fields = tiny_config(config).to_dict()
    except Exception:  # anything that a config class raises over sizes; inference reports it
        fields = config.to_dict()
    fields = {name: value for name, value in fields.items() if name not in FILE_FIELDS}
    content = [_FORMAT, transformers.__version__, type(config).__name__, fields]
    key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return Path(constants.HF_HOME) / "adapruner" / "families" / f"{config.model_type}-{key[:16]}.json"

"""The prunable parts and the family of a model, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapruner.config import ExpertGranularity, HeadGranularity
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config, resolve
from adapruner.families.proof import failed_parts
from adapruner.models._architecture import Architecture, register_architectures
from adapruner.models._config import find_wrapper, load_config
from adapruner.models._loading import empty_model
from adapruner.models._places import find_model
from adapruner.structure._blocks import Structure, count_parameters
from adapruner.structure._build import build_structure

if TYPE_CHECKING:
    from adapruner.run.given import ModelGiven


def inspect(
    model: ModelGiven, head_granularity: HeadGranularity = "kv-group", expert_granularity: ExpertGranularity = "expert"
) -> Structure:
    """The prunable parts of a model, from its config alone.

    Args:
        model: as for `load`, or a model in memory.
        head_granularity, expert_granularity: as in `PruneOptions`.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    if isinstance(model, str | Path):
        config = open_config(find_model(str(model)))
    else:
        # Not imported for a model by name: it imports the readers of text.
        from adapruner.run.given import check_model

        check_model(model)
        config = model.config
    return build_structure(empty_model(config), head_granularity, expert_granularity)


def multimodal(model: str | Path) -> tuple[str, int] | None:
    """The type and the number of parameters of the multimodal model whose decoder `inspect` shows; None for a text
    model."""
    location = find_model(str(model))
    wrapper = find_wrapper(location)
    if wrapper is None:
        return None
    return wrapper.config.model_type, count_parameters(wrapper.around(open_config(location)))


def describe(model: str | Path) -> Architecture:
    """The family of a model, from its config alone: as a file describes it, or as it was inferred and proven.

    Raises:
        AdaPrunerError: there is no such model, or its family cannot be pruned.
    """
    return resolve(load_config(find_model(str(model))))


def check_described(model: str | Path, file: str | Path) -> None:
    """Registers the families that a file or folder describes, and checks the family of a model on a tiny one.

    Raises:
        AdaPrunerError: the file is invalid, describes other families, or a check fails; with the part and the reason.
    """
    families, config = register_architectures(Path(file)), load_config(find_model(str(model)))
    if config.model_type not in families:
        raise AdaPrunerError(f"{file} describes {', '.join(families)}, not {config.model_type}, the family of {model}")
    if failures := failed_parts(config, resolve(config)):
        reasons = "; ".join(f"{part}: {failure}" for part, failure in failures.items())
        raise AdaPrunerError(f"the description of {config.model_type} in {file} is wrong ({reasons})")

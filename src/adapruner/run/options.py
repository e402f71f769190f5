"""The config of a run, from what a caller gives: by name, in memory, in a recipe or a config."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._blend import absolute_blend
from adapruner.calibration._sources import absolute_source, register_sources
from adapruner.config import BUDGETS, PruneConfig, PruneOptions, SizeLimit
from adapruner.errors import AdaPrunerError
from adapruner.families import open_config
from adapruner.graph.folder import RunFolder
from adapruner.models._architecture import register_architectures
from adapruner.models._places import find_model
from adapruner.option_rules import EFFORTS
from adapruner.paths import given_path
from adapruner.recipe import override, read_recipe
from adapruner.run.engines import options_for
from adapruner.run.given import check_prunable, check_tokenizer, save_model, save_text
from adapruner.run.size import ratio_within

# The options whose values may be in memory.
_IN_MEMORY = ("model", "calibration", "objective")


def resolve(
    options: Mapping[str, Any],
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
    # Mistakes are told before anything is written.
    resolved = PruneConfig.from_options(**given | {name: type(value).__name__ for name, value in in_memory.items()})
    if tokenizer is not None and "model" not in in_memory:
        raise AdaPrunerError("`tokenizer` is for a model in memory: leave it out, or load the model")
    if in_memory:
        run.check_usable()
        resolved = resolved.model_copy(update=_in_files(in_memory, tokenizer, run.given))
    resolved = _with_absolute_paths(resolved)
    if resolved.for_:
        set_for_engines = options_for(resolved, open_config(find_model(resolved.model)))
        resolved = PruneConfig.from_options(**resolved.model_dump(exclude_unset=True) | set_for_engines)
    if limit.gguf_type and not {"llama.cpp", "any"} & {*resolved.for_}:
        raise AdaPrunerError("`gguf_type` is the type of a file for llama.cpp: add `for_` llama.cpp")
    if limit.size or limit.memory:
        resolved = resolved.model_copy(update={"ratio": ratio_within(limit, resolved)})
    return resolved


def earlier_run(folder: str | Path | None, run: RunFolder) -> RunFolder | None:
    """The folder of an earlier run that a user names.

    Raises:
        AdaPrunerError: it is the folder of the run itself.
    """
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
    earlier: RunFolder | None, recipe: str | Path | None, config: PruneOptions | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], SizeLimit]:
    """The options of an earlier run, a recipe and a config, overridden by those that are given by name, and a size that
    replaces the ratio; a model or text may be in memory."""
    base: dict[str, Any] = {}
    if earlier:
        then = earlier.read_config()
        set_by_effort = EFFORTS[then.effort].items()
        base = {
            name: value
            for name, value in then.model_dump(exclude_defaults=True, exclude={"searched"}).items()
            if (name, value) not in set_by_effort
        }
    if recipe:
        base = override(base, read_recipe(recipe))
    if config:
        base = override(base, config.model_dump(exclude_unset=True, exclude={"searched"}))
    own = {name: value for name, value in options.items() if value is not None or name not in ("model", "calibration")}
    given = override(base, own)
    given = EFFORTS.get(str(given.get("effort")), {}) | given
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
    tokenizer = check_tokenizer(tokenizer)
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
    return config.model_copy(update=absolute | {"evaluate": tuple(map(absolute_source, config.evaluate))})

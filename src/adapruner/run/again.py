"""Another ratio or target with what a finished run has measured and found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapruner.config import BUDGETS, TARGET_OPTIONS, TARGETS, PruneConfig, PruneOptions
from adapruner.errors import AdaPrunerError
from adapruner.graph import Record, RunFolder
from adapruner.paths import given_path
from adapruner.progress import Reporter
from adapruner.result import PruneResult
from adapruner.run.api import make_run
from adapruner.run.makings import makings_of
from adapruner.run.nodes import chosen
from adapruner.run.nodes.amount import starting_ratio
from adapruner.run.options import register_extensions


def plan_again(
    source: str | Path, output: str | Path, ratio: float | None = None, overwrite: bool = False, **target: Any
) -> PruneResult:
    """Another ratio with the statistics and the best point of a finished search: no measuring, no search.

    Args:
        source: the folder of the earlier run.
        output: the folder of the new run.
        ratio: the new ratio.
        target: what replaces it, as for `prune`: `target_size`, `target_memory` or `target_speed`, and their options.

    Raises:
        AdaPrunerError: the earlier run has no finished search or was made from other files, or the ratio, the target or
            the new folder is invalid.
    """
    earlier, run = RunFolder(given_path(source)), RunFolder(given_path(output))
    if run.path.resolve() == earlier.path.resolve():
        raise AdaPrunerError(f"{output} is the earlier run itself: choose another `output`")
    config = earlier.read_config()
    register_extensions(config)
    if (ratio is None) is all(target.get(name) is None for name in TARGETS):
        raise AdaPrunerError(f"give one of {', '.join(f'`{name}`' for name in BUDGETS)}: how much is removed")
    # What the earlier run was to meet does not count any more.
    unset = {name: PruneOptions.model_fields[name].default for name in TARGET_OPTIONS}
    options = config.model_dump() | unset | target | ({} if ratio is None else {"ratio": ratio})
    again = PruneConfig.from_options(**options)
    nearest = min(config.ratio, key=lambda searched: abs(searched - _ratio_of(again, run, earlier)))
    folder = earlier.at_ratio(nearest, config)
    record = _record_of_search(folder, config.model_copy(update={"ratio": (nearest,)}), earlier)
    # Whether the model fits depends on the ratio, and what was searched on how it computes.
    layer_wise = record.leaves["placement"]["layer_wise"]
    if again.target_speed and layer_wise:
        raise AdaPrunerError(
            f"`target_speed` is measured with all layers in memory, and {source} did not have them: give a `ratio`"
        )
    amount = {name: getattr(config, name) for name in TARGET_OPTIONS} if config.target else {"ratio": (nearest,)}
    again = again.model_copy(update={"layer_wise": layer_wise, "searched": config.searched or amount})
    taken = {chosen.found.path: folder}
    (result,) = make_run(again, run, overwrite, (earlier, folder), taken)
    return result


def _ratio_of(config: PruneConfig, run: RunFolder, earlier: RunFolder) -> float:
    (making,) = makings_of(config, run, Reporter(), (earlier,))
    return float(making.value(starting_ratio))


def _record_of_search(folder: RunFolder, config: PruneConfig, earlier: RunFolder) -> Record:
    """The record of the search of an earlier run.

    Raises:
        AdaPrunerError: it is not finished, or would be another now.
    """
    record = folder.record(chosen.found.path)
    if record is not None and folder.is_made(record.name, record.key):
        by_layer = record.leaves["placement"]["layer_wise"]
        as_then = config.model_copy(update={"layer_wise": by_layer})
        (making,) = makings_of(as_then, earlier, Reporter(quiet=True))
        now = making.record(chosen.found)
        # A search that was itself taken from another run was made with the options of that.
        is_taken = "taken" in record.leaves
        if record.leaves.items() >= now.leaves.items() if is_taken else record.key == now.key:
            return record
    raise AdaPrunerError(
        f"{earlier.path} has no finished search of this model and text with its options: rerun the command of that run"
        " first"
    )

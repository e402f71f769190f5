"""The making of a run, and what is checked before the work begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, describe_failure
from adapruner.evaluation._tasks import check_tasks
from adapruner.graph.folder import RunFolder
from adapruner.graph.making import Making
from adapruner.graph.records import Record
from adapruner.progress import Reporter, StageCost
from adapruner.run.nodes import chosen, inputs, models
from adapruner.run.nodes.declared import GRAPH


def making_of(
    config: PruneConfig,
    run: RunFolder,
    reporter: Reporter,
    earlier: RunFolder | None = None,
    known: Mapping[str, Any] | None = None,
) -> Making:
    """What makes a run.

    Args:
        earlier: a run whose artifacts are taken over: those with the same key, and its search if only the ratio
            differs.
        known: values of nodes that are not to be made.
    """

    def stage_costs() -> dict[str, StageCost]:
        return reporter.finished_stages(making.keys())

    given = {
        "config": config,
        "reporter": reporter,
        "run_folder": run,
        "stage_costs": stage_costs,
    }
    making = Making(
        graph=GRAPH,
        options=dict(config),
        as_json=config.model_dump(mode="json"),
        given=given,
        folder=run,
        reporter=reporter,
        others=() if earlier is None else (earlier,),
        values=dict(known or {}),
    )
    if earlier and (search := _search_of(making, earlier)):
        making.taken = {search.name: search}
        given["config"] = config.model_copy(update={"searched": search.options["ratio"]})
    return making


def _search_of(making: Making, earlier: RunFolder) -> Record | None:
    """The record of the finished search of an earlier run if that differs from the one of a run in its ratio alone."""
    now, then = making.record(chosen.found), earlier.record(chosen.found.path)
    if then is None or now.key == then.key or not earlier.is_made(then.name, then.key):
        return None
    as_then = now.model_copy(update={"options": now.options | {"ratio": then.options.get("ratio")}})
    return then.model_copy(update={"files": None}) if as_then.key == then.key else None


def check(making: Making, overwrite: bool) -> None:
    """Refuses what would fail later.

    Raises:
        AdaPrunerError: something would be replaced that was made otherwise, or cannot be made.
    """
    if not overwrite:
        making.refuse_outdated()
    if tasks := making.options["tasks"]:
        check_tasks(tasks)
    missing = making.missing()
    making.prepare(missing)
    if models.recovered in missing:
        making.value(models.examples)
        making.forget_but([node.name for node in missing])


@contextlib.contextmanager
def saying_what_is_kept(making: Making) -> Iterator[None]:
    """Turns failures of the machine into one line.

    Raises:
        AdaPrunerError: in their place.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        stage = making.reporter.current
        failure = describe_failure(error, _what_needs_less(making, stage))
        if failure is None:
            raise
        raise AdaPrunerError(
            f"{stage}: {failure}. Finished artifacts are kept in {making.folder.path}: rerun the same command to resume"
        ) from error


def _what_needs_less(making: Making, stage: str) -> str:
    """Advice to the user where a stage has run out of memory."""
    if stage == "recovering":
        return f"adapruner recover {making.folder.model} with a smaller `micro_batch_size` needs less memory"
    if not making.value(inputs.placement).layer_wise and making.value(inputs.location).gguf_file is None:
        return "`layer_wise` needs less memory; with `overwrite`, it rebuilds what was made with all layers in memory"
    return "`dtype` bfloat16 and a smaller `pool` need less memory, in another run"

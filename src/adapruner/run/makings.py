"""The makings of a run, one for each of its ratios, and what is checked before the work begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapruner.config import PruneConfig
from adapruner.errors import AdaPrunerError, describe_failure
from adapruner.evaluation import check_tasks
from adapruner.graph import Making, RunFolder, refuse_outdated
from adapruner.progress import Reporter, StageCost
from adapruner.run.nodes import GRAPH, inputs, placed


def makings_of(
    config: PruneConfig,
    run: RunFolder,
    reporter: Reporter,
    others: Sequence[RunFolder] = (),
    taken: Mapping[str, RunFolder] | None = None,
    known: Mapping[str, Any] | None = None,
) -> list[Making]:
    """One for each ratio, in ascending order. What does not depend on the ratio is in memory once.

    Args:
        known: values of nodes that are not to be made.
    """
    shared, makings = dict(known or {}), list[Making]()
    for ratio in config.ratio:
        at_ratio = config.model_copy(update={"ratio": (ratio,)})

        def stage_costs(number: int = len(makings)) -> dict[str, StageCost]:
            return reporter.finished_stages(makings[number].keys())

        given = {
            "config": at_ratio,
            "largest_ratio_asked": max(config.ratio),
            "reporter": reporter,
            "run_folder": run,
            "stage_costs": stage_costs,
        }
        making = Making(
            graph=GRAPH,
            options=dict(at_ratio) | {"ratio": ratio},
            as_json=at_ratio.model_dump(mode="json"),
            given=given,
            root=run,
            folder=run.at_ratio(ratio, config),
            reporter=reporter,
            # What an earlier run for this ratio alone, or for others too, made is taken over.
            others=(*others, run, run.of_ratio(ratio)),
            taken=taken or {},
            shared=shared,
        )
        makings.append(making)
    return makings


def check(makings: Sequence[Making], overwrite: bool) -> None:
    """Refuses what would fail later.

    Raises:
        AdaPrunerError: something would be replaced that was made otherwise, or cannot be made.
    """
    if not overwrite:
        refuse_outdated(makings, makings[0].root.path)
    if tasks := makings[0].options["tasks"]:
        check_tasks(tasks)
    for making in makings:
        making.prepare(making.missing())


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
            f"{stage}: {failure}. Finished artifacts are kept in {making.root.path}: rerun the same command to resume"
        ) from error


def _what_needs_less(making: Making, stage: str) -> str:
    """Advice to the user where a stage has run out of memory."""
    if stage == "recovering":
        return f"adapruner recover {making.root.model} with a smaller `micro_batch_size` needs less memory"
    if not making.value(placed.placement).layer_wise and making.value(inputs.location).gguf_file is None:
        return "`layer_wise` needs less memory; with `overwrite`, it rebuilds what was made with all layers in memory"
    return "`dtype` bfloat16 and a smaller `pool` need less memory, in another run"

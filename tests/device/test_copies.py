"""How often a run on a GPU waits for a copy or a value: the GPU has nothing to do meanwhile."""

from typing import NamedTuple

import pytest

from device.client import LAYER_WISE, SMALL_RUN, only_json, pruning


class Most(NamedTuple):
    """How often each may happen for one step of a stage, as its bar counts them: a layer, a block, a sample, a window,
    a trial, or a step of the optimizer. Copies that do not block are not counted."""

    to_device: float
    from_device: float
    waits: float


# About one and a half times what a Llama of 4 layers with 9 weights each needs. Raise a number only where the copies
# are worth it. Loading and saving copy every weight once and are not listed.
IN_MEMORY = {
    "writing text": Most(3, 1, 7),
    "reading activations": Most(3, 6, 30),
    "measuring": Most(2, 17, 2),
    "comparing removals": Most(2, 3, 8),
    "ranking attention layers": Most(2, 1, 2),
    "searching": Most(32, 3, 9),
    "levelling widths": Most(52, 3, 8),
    "cutting": Most(18, 1, 3),
    "compensating": Most(2, 1, 2),
    "tuning scales": Most(63, 170, 93),
    "recovering": Most(78, 350, 11),
    "evaluating": Most(1, 1, 1),
    "looking for breakage": Most(1, 1, 3),
}
# A layer is copied to the device whenever it is used.
LAYER_BY_LAYER = IN_MEMORY | {
    "writing text": Most(105, 1, 7),
    "reading activations": Most(20, 6, 30),
    "measuring": Most(183, 39, 3),
    "comparing removals": Most(9, 3, 8),
    "ranking attention layers": Most(40, 1, 2),
    "searching": Most(96, 3, 9),
    "levelling widths": Most(270, 17, 8),
    "cutting": Most(72, 54, 3),
    "compensating": Most(25, 1, 2),
    "tuning scales": Most(390, 170, 93),
    "evaluating": Most(10, 1, 1),
    "looking for breakage": Most(3, 1, 1),
}


@pytest.mark.device_matrix
@pytest.mark.parametrize(
    ("options", "budget"), [({}, IN_MEMORY), (LAYER_WISE, LAYER_BY_LAYER)], ids=["in memory", "layer by layer"]
)
def test_a_run_waits_no_more_often_than_is_written_here(options, budget, device, family, text_file, tmp_path):
    command = pruning(family("llama"), text_file, tmp_path / "a", SMALL_RUN | options, recovery={})
    outcome = device.run(*command, "--evaluate", text_file)
    only_json(outcome)
    measured = {}
    for name in {stage.name for stage in outcome.stages} - {"loading", "saving"}:
        steps = sum(stage.steps for stage in outcome.stages if stage.name == name)
        measured[name] = Most(*(outcome.count(name, kind) / steps for kind in ("h2d", "d2h", "wait")))
    assert measured.keys() == budget.keys()
    too_often = {
        f"{name}: {what}": (count, most)
        for name in measured
        for what, count, most in zip(Most._fields, measured[name], budget[name], strict=True)
        if count > most
    }
    assert too_often == {}

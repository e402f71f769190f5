"""A whole run with the default options on the simulated device and on the CPU, both in float32:

    PYTHONPATH=tests python tests/device/whole_run.py MODEL --calibration SRC [options of adapruner prune] -o FOLDER

Prints how far the two agree, as JSON. Rerun it to resume; exits with 1 where the plans differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapruner.planning import PruningPlan
from device import building
from device.client import Device
from device.results import only_json


def compare(device: Device, arguments: Sequence[object], output: Path) -> dict[str, Any]:
    """Runs `adapruner prune` on both devices.

    Args:
        arguments: of the command, without the device and the output folder.
        output: for the two run folders.

    Returns:
        `same_plan`, the fraction of the `same_groups` among the groups that are kept on either device, and by device
        `perplexity`, by model and text, and `seconds`.
    """
    plans, agreement = [], dict[str, Any](perplexity={}, seconds={})
    for place in ("cuda", "cpu"):
        command = ("prune", *arguments, "-o", output / place, "--device", place, "--dtype", "float32", "--json")
        outcome = device.run(*command, native_bfloat16=False)
        result = only_json(outcome)
        plans.append(PruningPlan.load(output / place / "plan.json"))
        agreement["seconds"][place] = round(outcome.seconds)
        agreement["perplexity"][place] = {
            f"{model['role']}/{text}": one["perplexity"]
            for model in result["models"]
            for text, one in model["perplexity"].items()
        }
    kept = [{(number, group) for number, block in enumerate(plan.blocks) for group in block.kept} for plan in plans]
    same = len(kept[0] & kept[1]) / len(kept[0] | kept[1])
    return {"same_plan": plans[0].hash == plans[1].hash, "same_groups": same, **agreement}


if __name__ == "__main__":
    if reason := building.reason_against():
        sys.exit(f"the CUDA device cannot be simulated: {reason}")
    building.build()
    *options, flag, folder = sys.argv[1:]
    if flag not in ("-o", "--output"):
        sys.exit(__doc__)
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    device = Device(output)
    agreement = compare(device, options, output)
    device.close()
    print(json.dumps(agreement, indent=2))
    sys.exit(not agreement["same_plan"])

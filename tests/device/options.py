"""Commands that take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from run_helpers import RUN_OPTIONS, flags

SMALL_RUN = RUN_OPTIONS | {
    "trials": 6,
    "compensation_windows": 16,
    "self_windows": 8,
    "final_windows": 6,
    "level_rounds": 1,
    "evaluate_windows": 6,
}
# Training on a device is tested here.
del SMALL_RUN["tune_scales"]
LAYER_WISE = {"layer_wise": True}
SMALL_RECOVERY = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "seq_len": 16, "warmup_steps": 0, "records": 40}


def pruning(
    model: Path,
    text: Path,
    output: Path,
    options: Mapping[str, object] = SMALL_RUN,
    recovery: Mapping[str, object] | None = None,
) -> list[object]:
    """The command that prunes a model, and fine-tunes it with these changes to the options of a recovery, if any."""
    fine_tuned = [] if recovery is None else ["--recover", text, *flags(SMALL_RECOVERY | recovery, "recovery.")]
    return ["prune", model, "-o", output, "--calibration", text, *flags(options), *fine_tuned, "--json"]


def recovering(model: Path, data: object, output: Path, **options: object) -> list[object]:
    """The command that fine-tunes a model."""
    return ["recover", model, "--data", data, "-o", output, *flags(SMALL_RECOVERY | options), "--json"]

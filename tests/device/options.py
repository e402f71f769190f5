"""Options of commands that take seconds."""

from __future__ import annotations

from run_helpers import RUN_OPTIONS

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
# Layer by layer nothing is written by the model, and no widths are levelled.
LAYER_WISE = {"layer_wise": True, "self_windows": 0, "level_rounds": 0}
SMALL_RECOVERY = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "seq_len": 16, "warmup_steps": 0, "records": 40}

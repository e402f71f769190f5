"""Recovery of a pruned model: fine-tuning or distillation, with LoRA or of all weights."""

from adapruner.recovery._adapters import check_adapters, scale_options
from adapruner.recovery._examples import (
    DEFAULT_GENERATED_RECORDS,
    Examples,
    instruction_examples,
    read_examples,
    window_examples,
)
from adapruner.recovery._folder import (
    begin_training,
    check_folder,
    read_record,
    recover_into,
    training_alone,
    working_folder,
)
from adapruner.recovery._trainers import distillation_loss
from adapruner.recovery._training import (
    RecoveryRecord,
    check_batch_size,
    check_device,
    total_steps,
    train,
)

__all__ = [
    "DEFAULT_GENERATED_RECORDS",
    "Examples",
    "RecoveryRecord",
    "begin_training",
    "check_adapters",
    "check_batch_size",
    "check_device",
    "check_folder",
    "distillation_loss",
    "instruction_examples",
    "read_examples",
    "read_record",
    "recover_into",
    "scale_options",
    "total_steps",
    "train",
    "training_alone",
    "window_examples",
    "working_folder",
]

"""Recovery of a pruned model: fine-tuning or distillation, with LoRA or of all weights."""

from adapruner.recovery._adapters import check_adapters as check_adapters, scale_options as scale_options
from adapruner.recovery._checks import (
    check_device as check_device,
    check_processes as check_processes,
    check_trainer_options as check_trainer_options,
)
from adapruner.recovery._examples import (
    Example as Example,
    Examples as Examples,
    Unwritten as Unwritten,
    instruction_examples as instruction_examples,
    read_examples as read_examples,
    window_examples as window_examples,
)
from adapruner.recovery._folder import (
    begin_training as begin_training,
    check_folder as check_folder,
    read_record as read_record,
    recover_into as recover_into,
    training_alone as training_alone,
    working_folder as working_folder,
)
from adapruner.recovery._loss import PREDICTIONS_AT_ONCE as PREDICTIONS_AT_ONCE
from adapruner.recovery._predictions import write_predictions as write_predictions
from adapruner.recovery._sharding import shard as shard
from adapruner.recovery._training import (
    RecoveryRecord as RecoveryRecord,
    total_steps as total_steps,
    train as train,
)

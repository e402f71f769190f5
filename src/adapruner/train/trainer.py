"""The Trainer of transformers with losses per token; adapters of PEFT: LoRA (arXiv 2106.09685) and the scales of IA3
(arXiv 2205.05638); FSDP, which shards weights over processes.

Options that the Trainer would refuse late are refused early."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp_utils
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.pytorch_utils import Conv1D
from transformers.trainer import FSDP_MODEL_NAME

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.processes import random_state_kept, this_process
from adapruner.model.architecture import architecture_of
from adapruner.model.config import computes_bfloat16_natively
from adapruner.model.layers import change_weight, decoder_layers, is_streamed
from adapruner.model.loading import copy_in_dtype, in_fastest_dtype
from adapruner.model.places import quiet_transformers
from adapruner.model.stored import deferred_by_module, read_parts
from adapruner.options import RecoveryOptions, TrainedWeights
from adapruner.train.examples import IGNORED, Example
from adapruner.train.loss import Predictor, VocabularySample, loss_of_batch


def check_adapters(empty: PreTrainedModel, options: RecoveryOptions) -> None:
    """Refuses a family that adapters cannot be put on; the model without weights cannot be used afterwards."""
    with random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapters(empty, options)


def frozen(model: PreTrainedModel, train: TrainedWeights) -> PreTrainedModel:
    """The model, or a copy of it in a dtype to train adapters in: not float16, and bfloat16 if that is fast. Where
    scales are trained, weights of linear layers (and the embedding of a model in bfloat16) are in bfloat16, all else
    and what passes between layers in float32."""
    if model.dtype == torch.float16:
        model = copy_in_dtype(model, torch.bfloat16 if computes_bfloat16_natively(model.device) else torch.float32)
    if train != "ia3":
        return in_fastest_dtype(model)
    is_float32 = model.dtype == torch.float32
    if not multiplies_in_bfloat16(train, model.device) or is_streamed(model) or deferred_by_module(model):
        return model if is_float32 else in_fastest_dtype(model)
    # Times 1.001, a number in bfloat16 is the same number.
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    embedding = id(model.get_input_embeddings().weight)
    if is_float32:
        return copy_in_dtype(model, torch.bfloat16, linear - {embedding})
    others = {id(weight) for weight in model.parameters()} - linear - {embedding}
    copied = copy_in_dtype(model, torch.float32, others)
    # The embedding is large, and has no scale: its output alone becomes float32.
    copied.get_input_embeddings().register_forward_hook(lambda _, __, states: states.float())
    return copied


def multiplies_in_bfloat16(train: TrainedWeights, device: torch.device) -> bool:
    """True if weights that are trained in float32 are rounded for products alone. FSDP would round scales before they
    are used; LoRA has weights in bfloat16."""
    rounds_scales = train == "ia3" and this_process().shares_weights
    return train != "lora" and not rounds_scales and computes_bfloat16_natively(device)


def with_adapters(model: PreTrainedModel, options: RecoveryOptions) -> object:
    """Adapters on every linear layer of the decoder layers, in float32: of LoRA, or with IA3 a scale for each input."""
    layers = architecture_of(model.config).layers
    modules = [(name, module) for name, module in model.named_modules() if name.startswith(f"{layers}.")]
    linear = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    is_transposed = any(isinstance(module, Conv1D) for _, module in modules)
    settings: Any = {"target_modules": linear, "fan_in_fan_out": is_transposed, "task_type": "CAUSAL_LM"}
    config: PeftConfig
    if options.train == "ia3":
        # PEFT scales the inputs of the modules that it calls feed-forward, and the outputs of others.
        config = IA3Config(feedforward_modules=linear, **settings)
    else:
        settings |= {"lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout}
        config = LoraConfig(r=options.lora_rank, **settings)
    try:
        # PEFT would take these names for those of transformers 4, in which every expert had modules of its own.
        with patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers", lambda *_, **__: 0):
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise AdaPrunerError(
            f"PEFT cannot put adapters on a {model.config.model_type} ({reason(error)}): set `train` to full"
        ) from error
    # PEFT would load saved adapters onto the first GPU, wherever the model is.
    adapted.load_adapter = partial(adapted.load_adapter, torch_device=str(model.device))
    return adapted


def unload_adapters(adapted: Any) -> dict[str, Any]:
    """Removes adapters from the model below; returns them by the path of their layer."""
    adapters = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer | IA3Layer)
    }
    adapted.unload()
    return adapters


def merge(adapters: Mapping[str, object], model: PreTrainedModel) -> None:
    """Merges adapters into the weights of a model in float32, one at a time: the changes of all weights together are
    twice as large as a model in bfloat16."""

    def merged(adapter: Any, is_transposed: bool, weight: Tensor) -> Tensor:
        if isinstance(adapter, IA3Layer):
            scales: Tensor = adapter.ia3_l["default"].to(weight.device)  # [1, inputs]
            return weight.float() * (scales.T if is_transposed else scales)
        change: Tensor = adapter.get_delta_weight("default")
        return change.to(weight.device).float().add_(weight)

    with torch.no_grad():
        for name, adapter in adapters.items():
            is_transposed = isinstance(model.get_submodule(name), Conv1D)
            change_weight(model, f"{name}.weight", partial(merged, adapter, is_transposed))


def refuse_other_sharding(checkpoint: Path, sharded: bool) -> None:
    """Refuses to resume training with FSDP that began without it, or the reverse: the form of the weights differs."""
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file() != sharded:
        way = "without FSDP" if sharded else "with FSDP: launch it as before, with any number of processes, also one"
        raise AdaPrunerError(
            f"the training in {checkpoint.parent} resumes only {way}; delete that folder to start the training again"
        )


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Shares the weights of a deferred model out over all processes, in place, to be run, not trained; each reads its
    part. A layer has its weights whole while it runs; all else is whole from the first call of the model on."""
    PartialState()  # connects the processes, as the Trainer does later
    state, device = model.state_dict(), model.device
    mesh = init_device_mesh(device.type, (this_process().count,))
    cast(nn.Module, model)._apply(lambda tensor: tensor.to("meta") if isinstance(tensor, nn.Parameter) else tensor)
    model.tie_weights(recompute_mapping=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        fully_shard(embedding, mesh=mesh)
    fully_shard(model, reshard_after_forward=False, mesh=mesh)
    read_parts(model, state, device)
    model.tie_weights(recompute_mapping=False)
    return model


@contextmanager
def sharded(trainer: Trainer) -> Iterator[None]:
    """Trains with FSDP 2 while it lasts: every process reads its part of the weights, where accelerate would have the
    first one hold and broadcast them; the loss is computed and gradients are added up in float32; and checkpoints are
    saved unsharded. At the end, the first process has all weights in main memory, in modules of their original classes,
    to be saved and not run; the others keep their shards."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise AdaPrunerError(f"FSDP version {plugin.fsdp_version} is not supported: launch with --fsdp_version 2")
    plugin.cpu_ram_efficient_loading = True
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(policy := plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=torch.float32)

    def load(
        accelerator: Accelerator, model: nn.Module, state: Mapping[str, Tensor], cpu_offload: bool = False
    ) -> None:
        read_parts(model, state, torch.device("cpu") if cpu_offload else accelerator.device)

    before, fsdp_utils.fsdp2_load_full_state_dict = fsdp_utils.fsdp2_load_full_state_dict, load
    try:
        yield
    finally:
        fsdp_utils.fsdp2_load_full_state_dict = before
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not this_process().leads:
        return
    model: Any = trainer.model
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP derives a class from this one and the original
            module.__class__ = type(module).__mro__[2]
    for path, weight in whole.items():
        module_path, _, name = path.rpartition(".")
        parameters = model.get_submodule(module_path)._parameters
        if name in parameters:
            parameters[name] = nn.Parameter(weight, requires_grad=False)


# The environment variables that select the visible accelerators.
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


class TokenTrainer(Trainer):
    """A Trainer whose loss is the mean over the learnt tokens of a whole batch, or of all validation examples.

    Args:
        student: `model` of the parts, or the model below its adapters. Its forward pass gives the loss until
            `give_back`.
        teacher: run on every batch; None learns the labels, or predictions on disk.
        sample: of the vocabulary, over which the two are compared.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        temperature: float,
        sample: VocabularySample | None,
        **parts: Any,
    ) -> None:
        self._student, self._predictor = student, Predictor(student)
        self._teacher = Predictor(teacher) if teacher else None
        self._temperature, self._sample = temperature, sample
        self._taught: Tensor | tuple[Tensor, Tensor] | None = None
        cast(Any, student).forward = MethodType(self._loss_of_batch, student)
        super().__init__(**parts)
        self.model_accepts_loss_kwargs = True  # it counts the tokens of a whole batch

    def give_back(self) -> None:
        """Gives the student its own forward pass back, without autocasts, and without references to this Trainer."""
        for name in ("forward", "_original_forward"):
            vars(self._student).pop(name, None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        # FSDP would round what its model is given.
        self._label_weight, self._taught = inputs.pop("label_weight"), inputs.pop("taught", None)
        if self._teacher:
            with torch.no_grad():
                self._taught = self._teacher.called(inputs["input_ids"], inputs["attention_mask"])
        # The Trainer counts the learnt tokens of all processes, and averages gradients over them.
        self._scale = self.accelerator.num_processes / float(num_items_in_batch or 1)
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _loss_of_batch(
        self, student: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: object
    ) -> dict[str, Tensor]:
        """Inside of what the Trainer wraps the model in: with FSDP, the weights of the head are whole there."""
        hidden = self._predictor.hidden_states(input_ids, attention_mask)
        parts = self._label_weight, self._scale, self._temperature, self._teacher, self._taught, self._sample
        return {"loss": loss_of_batch(self._predictor, hidden, labels, *parts)}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        loss, *logits_and_labels = super().prediction_step(model, inputs, *rest, **named)
        assert loss is not None
        # The Trainer averages over examples. The sum over tokens was divided by the mean number per process.
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.args.device)
        mean = float(self.accelerator.gather(tokens).float().mean())
        return (loss * (mean / len(inputs["labels"]) / self._tokens_per_example), *logits_and_labels)

    @cached_property
    def _tokens_per_example(self) -> float:
        """The mean number of learnt tokens per validation example."""
        rows = cast(list[Example], self.eval_dataset)
        return sum(label != IGNORED for row in rows for label in row["labels"][1:]) / len(rows)


def check_device(device: torch.device) -> None:
    """Refuses a GPU that the Trainer does not train on: in a single process, any but the first."""
    if device.type != "cpu" and device.index and this_process().count == 1:
        raise AdaPrunerError(
            f"training runs on the first accelerator and not on {device}: set"
            f" {_VISIBLE.get(device.type, 'its variable for visible devices')}={device.index} and leave `device` out"
        )


def check_processes(options: RecoveryOptions) -> None:
    """Refuses a batch that the processes cannot share equally."""
    size, processes = options.batch_size, this_process().count
    if size % processes:
        raise AdaPrunerError(f"`batch_size` {size} cannot be divided among {processes} processes")


def check_trainer_options(options: RecoveryOptions) -> None:
    """Refuses an optimizer or an experiment tracker that the Trainer does not know, or whose package is missing."""
    try:
        arguments = TrainingArguments("unused", **trainer_options(options))
        Trainer.get_optimizer_cls_and_kwargs(arguments, cast(PreTrainedModel, nn.Linear(1, 1)))
    except (ImportError, NotImplementedError, ValueError) as error:
        raise AdaPrunerError(f"`optimizer` {options.optimizer}: {reason(error)}") from None
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise AdaPrunerError(f"`report_to` {options.report_to}: {reason(error)}") from None
    # The Trainer's default is a folder that is removed at the end of the training.
    if "tensorboard" in (arguments.report_to or ()) and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        raise AdaPrunerError(
            "`report_to` tensorboard: set the environment variable TENSORBOARD_LOGGING_DIR to a folder"
        )


def trainer_options(options: RecoveryOptions) -> dict[str, Any]:
    """The Trainer's arguments for the optimizer and the tracker; GaLore and APOLLO project the gradients of all linear
    layers."""
    return {"optim": options.optimizer, "optim_target_modules": "all-linear", "report_to": options.report_to}

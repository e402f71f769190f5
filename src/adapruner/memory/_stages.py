"""The memory that a pruning run needs, computed from shapes: the weights, and the tensors of every stage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from adapruner.config import Dtype, PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import tokens_per_batch
from adapruner.importance import needs_moments, needs_removal_errors
from adapruner.measurement import saved_activations
from adapruner.models import architecture_of, batches_together, decoder_layers, is_pruned, texts_at_once, trial_dtype
from adapruner.option_rules import fits_sequentially_by_default, may_remove_whole, scoring_bounds, written_count
from adapruner.planning import Budget, kept_counts
from adapruner.recovery import PREDICTIONS_AT_ONCE, scale_options
from adapruner.search import JUDGED_TOGETHER, reused_layers
from adapruner.structure import Structure

# Samples measured at once. Layer-wise, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}
# Tokens of the pool on which parts are removed whole, and on which the costs of widths are measured: the hidden states
# of all layers are kept for them. On fewer, attention is removed that other text needs
# (research/experiments/whole-parts.md).
TOKENS_FOR_WHOLE, TOKENS_FOR_COSTS, _FEWEST_WINDOWS = 4096, 8192, 8
# Windows of a batch when a layer is fitted.
_FITTED_AT_ONCE = 8
# Float32 tensors that are held while losses of training are computed, each as large as the predictions at once.
_TENSORS = 5
_FLOAT32 = 4

# Bytes by purpose, named after the option that lowers them if there is one.
Terms = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage needs on each device of the model and, if that is a GPU, in main memory; and the name of the
    largest term, which is the option that lowers it if there is one."""

    device: int
    host: int
    largest: str


def estimate_memory(
    config: PruneConfig,
    model: Any,
    structure: Structure,
    budget: Budget,
    device: torch.device,
    layer_wise: bool,
    devices: int = 1,
    is_mapped: bool = True,
) -> dict[str, Memory]:
    """The memory of every stage up to the saved model, without the program itself (half a GiB, with what libraries keep
    for later calls).

    Args:
        model: on the meta device.
        budget: the final budget, or the one that the search starts from.
        devices: number of devices that the layers are spread over.
        is_mapped: True if the dense model is mapped from its files: stages that run the copy for trials do not hold it.

    Raises:
        AdaPrunerError: the layers of the model already differ.
    """
    if is_pruned(model.config):
        raise AdaPrunerError("the memory needed to prune a model whose layers differ already cannot be estimated")
    on_host = {"pool", "dense predictions"} | ({"pruned weights"} if layer_wise else set())
    stages = _Stages(config, model, structure, kept_counts(structure, budget), device, layer_wise, devices, is_mapped)
    memory = {}
    for stage, terms in stages.terms().items():
        host = sum(size for term, size in terms.items() if term in on_host and device.type != "cpu")
        memory[stage] = Memory(sum(terms.values()) - host, host, max(terms, key=terms.__getitem__))
    return memory


def dtype_of_weights(model: Any, dtype: Dtype) -> torch.dtype:
    """The dtype that a model is loaded in: `auto` is the dtype of the checkpoint."""
    loaded: torch.dtype = model.config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return loaded


def windows_of(tokens: int, pool: int, seq_len: int) -> int:
    """Number of windows of the pool that have about `tokens` tokens."""
    return min(pool, max(_FEWEST_WINDOWS, tokens // seq_len))


def bytes_of_predictions(tokens: int, vocabulary: int) -> int:
    """Memory while the losses of training are computed, of a part of the tokens at a time."""
    return min(PREDICTIONS_AT_ONCE, tokens) * vocabulary * _FLOAT32 * _TENSORS


def _total(terms: Terms) -> int:
    return sum(terms.values())


class _Stages:
    """The memory of every stage of a run. The method of a stage returns an empty dict if the run skips it.

    Sizes are in bytes, but weights are numbers of weights, because they are held in one dtype or in two.

    Attributes:
        trial: bytes of a number in a trial.
        both: bytes of a weight, with its copy for trials where these have another dtype.
        layer: weights of the largest layer if one layer is held at a time, else 0: it is held in one dtype, and weights
            outside of layers in both.
        held: weights of the dense model on a device.
        share: largest share of inputs that a pruned block keeps.
        widest: largest number of inputs of a block.
        moments: the largest second moments.
        projection: the largest projection that is compensated.
        matrix: the largest matrix of any block, in float32.
        vectors, inputs: numbers of rows and columns, and of inputs, that sums are kept for.
        written: windows that the model writes for compensation.
        text: one number for every token that second moments are measured on.
        losses: the logits of a window and their log-softmax, in float32.
        states: the hidden states of a token before, between and after all layers.
    """

    def __init__(
        self,
        config: PruneConfig,
        model: Any,
        structure: Structure,
        counts: list[int],
        device: torch.device,
        by_layer: bool,
        devices: int,
        is_mapped: bool,
    ) -> None:
        self.config, self.model, self.structure, self.is_mapped = config, model, structure, is_mapped
        self.device, self.by_layer, self.devices = device, by_layer, devices
        self.dtype = dtype_of_weights(model, config.dtype)
        trials = trial_dtype(self.dtype, device)
        self.trial = trials.itemsize
        self.both = self.dtype.itemsize + (self.trial if trials != self.dtype else 0)
        self.vocabulary, self.hidden = map(int, model.get_input_embeddings().weight.shape)
        self.layer_weights = [sum(weight.numel() for weight in layer.parameters()) for layer in decoder_layers(model)]
        self.layer = max(self.layer_weights) if by_layer else 0
        self.held = self._weights_on_a_device()
        self.blocks = list(zip(structure.blocks, counts, strict=True))
        self.share = max((n / block.groups for block, n in self.blocks if n < block.groups), default=0.0)
        blocks = structure.blocks
        matrices = [(matrix, block) for block in blocks for matrix in block.matrices]
        self.widest = max(block.inputs for block in blocks)
        self.inputs = sum(block.inputs for block in blocks)
        self.moments = max(block.inputs * block.inputs_of_one for block in blocks) * _FLOAT32
        projected = [block.row_wise.elements * block.inputs for block in blocks if block.is_projected]
        self.projection = max(projected, default=0) * _FLOAT32
        self.matrix = max(matrix.elements * block.groups * matrix.width for matrix, block in matrices) * _FLOAT32
        self.vectors = sum(matrix.width * block.groups for matrix, block in matrices)
        self.written = written_count(
            config.self_windows, config.compensation_windows, can_write=config.calibration != "self"
        )
        self.text = (config.compensation_windows + self.written) * config.seq_len * self.trial
        self.losses = 2 * config.seq_len * self.vocabulary * _FLOAT32
        self.states = (structure.layers + 1) * self.hidden * self.trial

    def terms(self) -> dict[str, Terms]:
        """The terms of every stage that runs, in order."""
        stages = {
            "loading": self._loading(),
            "writing text": self._writing_text(),
            "reading activations": self._reading_activations(),
            "measuring": self._measuring(),
            "comparing removals": self._comparing_removals(),
            "removing parts whole": self._removing_whole(),
            "searching": self._searching(),
            "levelling widths": self._levelling(),
            "compensating": self._compensating(),
            "tuning scales": self._tuning_scales(),
        }
        return {stage: terms for stage, terms in stages.items() if terms}

    def _loading(self) -> Terms:
        return {"weights": (self.held - self.layer) * self.dtype.itemsize}

    def _writing_text(self) -> Terms:
        config, length = self.config, self.config.seq_len
        if not self.written or not needs_moments(config.compensation, config.space, config.terms):
            return {}
        dtype = trial_dtype(self.dtype, self.device)
        texts = texts_at_once(self.written, length, self.device)
        batches = math.ceil(self.written / texts)
        together = batches_together(self.model.config, texts, length, dtype) if self.by_layer else 1
        texts *= min(together, batches)
        cached = architecture_of(self.model.config).cached(self.model.config)
        writing = {
            "self_windows": texts * length * cached * dtype.itemsize // self.devices,
            "logits": 3 * texts * self.vocabulary * _FLOAT32,
        }
        # Then the cache is gone, and the losses of the text are computed.
        judging = {"logits": self._logits_bytes(self.written * length)}
        return self._trial_weights | max(writing, judging, key=_total)

    def _reading_activations(self) -> Terms:
        if not needs_moments(self.config.compensation, self.config.space, self.config.terms):
            return {}
        sums_by_layer = Counter[int]()
        for block in self.structure.blocks:
            sums_by_layer[block.layer] += block.inputs * block.inputs_of_one * _FLOAT32
        return self._trial_weights | {
            "compensation_windows": self.text * self.hidden,
            # Two sums for every block of a layer; for one block, both means, and two merged moments.
            "second moments": 2 * max(sums_by_layer.values()) + 4 * self.moments,
        }

    def _measuring(self) -> Terms:
        config, structure = self.config, self.structure
        at_once = min(MEASURED_AT_ONCE[self.by_layer], config.pool)
        kept = saved_activations(self.model.config, self.dtype) * (1 if self.by_layer else structure.layers)
        kept += self.vocabulary * self.dtype.itemsize
        # Layer by layer, the states before and after a layer and the gradient are held as well.
        going_back = 3 * (self.widest + self.by_layer * self.hidden) * self.dtype.itemsize
        return self._both_weights | {
            "seq_len": int(at_once * config.seq_len * (kept + going_back)) + self.losses,
            "gradients": 3 * (self.matrix if structure.cuts_experts else self.projection),
            "sums": at_once * (3 * self.vectors + 2 * self.inputs) * _FLOAT32,
        }

    def _comparing_removals(self) -> Terms:
        if not needs_removal_errors(self.config.space, self.config.terms):
            return {}
        # Twice the size in float32: some blocks need float64.
        moments = {"second moments": 8 * self.moments + 4 * self.projection}
        return self._both_weights | self._pool | moments

    def _removing_whole(self) -> Terms:
        config = self.config
        if not may_remove_whole(config.space, config.search, config.whole):
            return {}
        tokens = windows_of(TOKENS_FOR_WHOLE, config.pool, config.seq_len) * config.seq_len
        return self._trial_weights | {"seq_len": tokens * self.states, "logits": self._logits_bytes(tokens)}

    def _searching(self) -> Terms:
        config = self.config
        # Finalists are judged on the further windows.
        objective = (scoring_bounds(config.objective_windows)[1] + config.final_windows) * config.seq_len
        reused = reused_layers(config.layout, config.protect_first, self.structure.layers)
        known = reused + 1 if reused else 0
        # Layer by layer, trials hold one layer, and the hidden states of all windows.
        states = (known + self.by_layer * 2 * JUDGED_TOGETHER) * objective * self.hidden * self.trial
        pruned = "a pruned layer" if self.by_layer else "pruned weights"
        return {
            **self._judging,
            **self._correction(self.share),
            pruned: (self.layer if self.by_layer else self._pruned_weights) * self.trial,
            "logits": self._logits_bytes(objective),
            "objective_windows": states,
        }

    def _levelling(self) -> Terms:
        if not self.config.levels_widths:
            return {}
        tokens = windows_of(TOKENS_FOR_COSTS, self.config.pool, self.config.seq_len) * self.config.seq_len
        # Layer by layer, several candidates hold the hidden states of all windows.
        together = self.by_layer * JUDGED_TOGETHER * self.hidden * self.trial
        return {
            **self._judging,
            **self._correction(1.0),  # widths change block by block, down from the whole one
            "pruned weights": self._pruned_weights * self.trial + self.matrix,
            "a pruned layer": 2 * self.layer * self.trial,
            "logits": self._logits_bytes(tokens),
            "level_rounds": tokens * (self.states + together),
            "dense predictions": 2 * tokens * self.vocabulary,
        }

    def _compensating(self) -> Terms:
        model_config = self.model.config
        if not fits_sequentially_by_default(self.config.sequential, self.config.compensation) or not architecture_of(
            model_config
        ).has_plain_residual(model_config):
            return {}
        # One pruned layer at a time is copied to the dtype of trials.
        copied = max(self.layer_weights) * (self.both - self.dtype.itemsize)
        # The activations of a batch in a layer, and the outputs of up to three runs of it.
        batch = _FITTED_AT_ONCE * self.config.seq_len * 6 * (self.hidden + self.widest) * self.trial
        return {
            **self._both_weights,
            "second moments": int(4 * self.moments * self.share**2 + 3 * self.projection * self.share),
            "compensation_windows": self.text * (2 * self.hidden + self.widest),
            "pruned weights": self._pruned_weights * self.dtype.itemsize + copied,
            "seq_len": batch,
        }

    def _tuning_scales(self) -> Terms:
        if not self.config.tunes_scales or self.devices > 1:
            return {}
        removed = sum((block.groups - n) * block.parameters_per_group for block, n in self.blocks)
        options = scale_options(self.config.seed, self.device, self.by_layer, self.config.seq_len)
        tokens = options.micro_batch_size * self.config.seq_len
        # Scales are multiplied in float32.
        saved = saved_activations(self.model.config, torch.float32)
        checkpoints = options.gradient_checkpointing or self.by_layer
        activations = saved + self.states if checkpoints else self.structure.layers * saved
        buffers = {"seq_len": int(tokens * activations), "logits": bytes_of_predictions(tokens, self.vocabulary)}
        # The pruned model is converted to the dtype of trials, and trained in it.
        name, pruned = ("a pruned layer", self.held) if self.by_layer else ("pruned weights", self.held - removed)
        terms = max({name: pruned * self.both}, {name: pruned * self.trial} | buffers, key=_total)
        if self.by_layer:  # all layers are in memory when they are saved
            terms["pruned weights"] = self._pruned_weights * self.dtype.itemsize
        return self._trial_weights | terms

    def _weights_on_a_device(self) -> int:
        weights: int = sum(weight.numel() for weight in self.model.parameters())
        all_layers, largest = sum(self.layer_weights), max(self.layer_weights)
        if self.by_layer:
            weights -= all_layers - largest
        if self.devices > 1:
            # The first holds the weights outside of layers, and none holds more than a layer beyond its share.
            return max(weights // self.devices, weights - all_layers) + largest
        return weights

    @property
    def _pruned_weights(self) -> int:
        """Weights of the pruned model on a device. Layer by layer, none are shared with the dense model."""
        weights = sum(n * block.parameters_per_group for block, n in self.blocks if self.by_layer or n < block.groups)
        return weights // self.devices + max(self.layer_weights) if self.devices > 1 else weights

    @property
    def _both_weights(self) -> Terms:
        """The dense model and its copy for trials, which is made at the begin and kept."""
        return {"weights": (self.held - self.layer) * self.both + self.layer * self.dtype.itemsize}

    @property
    def _trial_weights(self) -> Terms:
        """The copy for trials, and the dense model if reading it again takes time."""
        return {"weights": self.held * self.trial} if self.is_mapped else self._both_weights

    @property
    def _judging(self) -> Terms:
        """Judging a candidate: the model for trials, and the statistics of all samples."""
        return self._trial_weights | self._pool

    def _correction(self, share: float) -> Terms:
        """Compensating one block of a candidate: its second moments, those of kept with kept and with removed inputs,
        the first of these scaled, and their factor.

        Args:
            share: of the inputs that are kept.
        """
        systems = 1 + 3 * share**2 + share * (1 - share)
        return {"second moments": int(systems * self.moments + 3 * self.projection * share)}

    @property
    def _pool(self) -> Terms:
        """The statistics of all samples."""
        per_sample = self.vectors * (3 if self.config.terms == "all" else 1) + 2 * self.inputs
        return {"pool": self.config.pool * per_sample * _FLOAT32}

    def _logits_bytes(self, tokens: int) -> int:
        """Bytes of the activations of a batch in a layer, or of its logits if these are larger, and of the losses.

        Args:
            tokens: of all batches.
        """
        per_token = max(self.vocabulary, 3 * self.widest + 4 * self.hidden) * self.trial
        return min(tokens_per_batch(self.device), tokens) * per_token + self.losses

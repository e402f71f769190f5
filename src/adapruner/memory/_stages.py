"""The memory that a pruning run needs, from shapes: the weights, and what every stage holds beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from adapruner.config import Dtype, PruneConfig
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import tokens_per_batch
from adapruner.measurement import saved_activations
from adapruner.models import architecture_of, decoder_layers, is_pruned, trial_dtype
from adapruner.planning import Budget, kept_counts
from adapruner.recovery import scale_options
from adapruner.search import JUDGED_TOGETHER, MOST_PROTECTED_FIRST
from adapruner.structure import Block, Structure

# Samples measured at once. Layer-wise, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}
# Of the calibration pool, on which parts are removed whole, and on which the costs of widths are measured: hidden
# states of all layers are kept for them. On fewer, attentions are removed that other text needs (docs/experiments.md).
TOKENS_FOR_WHOLE, TOKENS_FOR_COSTS, _FEWEST_WINDOWS = 4096, 8192, 8
# Windows whose layer is fitted at once.
_FITTED_AT_ONCE = 8
_FLOAT32 = 4

# Bytes by what they are for, named after the option that lowers them, where there is one.
Terms = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage needs on the device of the model, of several on each, and, beside a GPU, in main memory; and
    the largest term by the name of the option that lowers it, where one does."""

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
) -> dict[str, Memory]:
    """The memory of every stage up to the saved model, without the program itself (half a GiB).

    `model` is on the meta device; `budget` is what is removed, or what the search starts from; the layers are spread
    over so many `devices`.

    Raises:
        AdaPrunerError: the layers of the model already differ.
    """
    if is_pruned(model.config):
        raise AdaPrunerError("the memory needed to prune a model whose layers differ already cannot be estimated")
    on_host = {"pool", "dense predictions"} | ({"pruned weights"} if layer_wise else set())
    stages = _Stages(config, model, structure, kept_counts(structure, budget), device, layer_wise, devices)
    memory = {}
    for stage, terms in stages.terms().items():
        host = sum(size for term, size in terms.items() if term in on_host and device.type != "cpu")
        memory[stage] = Memory(sum(terms.values()) - host, host, max(terms, key=terms.__getitem__))
    return memory


def dtype_of_weights(model: Any, dtype: Dtype) -> torch.dtype:
    """What a model is loaded in: `auto` is the dtype of the checkpoint."""
    found: torch.dtype = model.config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return found


def windows_of(tokens: int, pool: int, seq_len: int) -> int:
    """How many windows of the pool have about so many tokens."""
    return min(pool, max(_FEWEST_WINDOWS, tokens // seq_len))


@dataclass(frozen=True)
class _Stages:
    """What every stage of a run holds. The method of a stage returns an empty dict if the run skips it.

    Attributes:
        counts: how many groups each block keeps, in the order of `structure.blocks`.
        devices: over how many the weights are spread; everything else is counted on each of them.
    """

    config: PruneConfig
    model: Any
    structure: Structure
    counts: list[int]
    device: torch.device
    by_layer: bool
    devices: int

    def terms(self) -> dict[str, Terms]:
        """By stage, in the order in which they run."""
        stages = {
            "loading": self._loading(),
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
        return {"weights": (self._held_weights - self._layer_weights) * self._dtype.itemsize}

    def _reading_activations(self) -> Terms:
        if self.config.compensation == "none" and self.config.space != "extended":
            return {}
        of_layers = Counter[int]()
        for block in self.structure.blocks:
            of_layers[block.layer] += block.inputs * block.inputs_of_one * _FLOAT32
        return self._both_weights | {
            "compensation_windows": self._text_bytes * self._hidden,
            # Two sums for every block of a layer; of one block, both means, and two of what they are merged into.
            "second moments": 2 * max(of_layers.values()) + 4 * self._moments_bytes,
        }

    def _measuring(self) -> Terms:
        config, structure = self.config, self.structure
        at_once = min(MEASURED_AT_ONCE[self.by_layer], config.pool)
        kept = saved_activations(self.model.config, self._dtype) * (1 if self.by_layer else structure.layers)
        kept += self._vocabulary * self._dtype.itemsize
        # Layer by layer, the states before and behind a layer and the gradient are held beside what it keeps.
        going_back = 3 * (self._widest + self.by_layer * self._hidden) * self._dtype.itemsize
        return self._weights | {
            "seq_len": int(at_once * config.seq_len * (kept + going_back)) + self._losses_bytes,
            "gradients": 3 * (self._largest_bytes if structure.cuts_experts else self._projection_bytes),
            "sums": at_once * (3 * self._vectors_measured + 2 * self._inputs_measured) * _FLOAT32,
        }

    def _comparing_removals(self) -> Terms:
        if self.config.space != "extended":
            return {}
        # Twice as much as float32 needs: some blocks need float64.
        moments = {"second moments": 8 * self._moments_bytes + 4 * self._projection_bytes}
        return self._weights | self._pool | moments

    def _removing_whole(self) -> Terms:
        config = self.config
        if config.space != "extended" or config.search != "joint" or config.whole == ("none",):
            return {}
        tokens = windows_of(TOKENS_FOR_WHOLE, config.pool, config.seq_len) * config.seq_len
        return self._both_weights | {"seq_len": tokens * self._states_bytes, "logits": self._logits_bytes(tokens)}

    def _searching(self) -> Terms:
        config = self.config
        # Finalists are judged on the further windows, and on their text in upper case.
        objective = (config.scoring_windows[1] + 2 * config.final_windows) * config.seq_len
        known = max(MOST_PROTECTED_FIRST, config.protect_first or 0) + 1 if config.layout == "per-layer" else 0
        # Layer by layer, trials have one layer in memory, and the hidden states of all windows.
        states = (known + self.by_layer * 2 * JUDGED_TOGETHER) * objective * self._hidden * self._trial_dtype.itemsize
        pruned = "a pruned layer" if self.by_layer else "pruned weights"
        return {
            **(self._both_weights | self._pool | self._solving),
            pruned: (self._layer_weights if self.by_layer else self._pruned_weights) * self._trial_dtype.itemsize,
            "logits": self._logits_bytes(objective),
            "objective_windows": states,
            "dense predictions": 2 * objective * self._vocabulary * (config.selection == "kl"),
        }

    def _levelling(self) -> Terms:
        if not self.config.levels_widths or self.by_layer:
            return {}
        tokens = windows_of(TOKENS_FOR_COSTS, self.config.pool, self.config.seq_len) * self.config.seq_len
        return {
            **(self._both_weights | self._pool | self._solving),
            "pruned weights": self._pruned_weights * self._trial_dtype.itemsize + self._largest_bytes,
            "logits": self._logits_bytes(tokens),
            "level_rounds": tokens * self._states_bytes,
            "dense predictions": 2 * tokens * self._vocabulary,
        }

    def _compensating(self) -> Terms:
        model_config = self.model.config
        if not self.config.fits_sequentially or not architecture_of(model_config).has_plain_residual(model_config):
            return {}
        # Only what loses something is fitted, in the inputs that it keeps.
        kept = (n / block.groups for block, n in self._blocks if n < block.groups)
        share = max(kept, default=0.0)
        # One pruned layer at a time is run in the dtype of trials.
        copied = max(self._layers) * (self._itemsize_of_both - self._dtype.itemsize)
        # Of a batch: what the layer computes, and what up to three runs of it have left.
        of_batch = (
            _FITTED_AT_ONCE * self.config.seq_len * 6 * (self._hidden + self._widest) * self._trial_dtype.itemsize
        )
        return {
            **self._both_weights,
            "second moments": int(4 * self._moments_bytes * share**2 + 3 * self._projection_bytes * share),
            "compensation_windows": self._text_bytes * (2 * self._hidden + self._widest),
            "pruned weights": self._pruned_weights * self._dtype.itemsize + copied,
            "seq_len": of_batch,
        }

    def _tuning_scales(self) -> Terms:
        if not self.config.tunes_scales or self.by_layer or self.devices > 1:
            return {}
        removed = sum((block.groups - n) * block.parameters_per_group for block, n in self._blocks)
        options = scale_options(self.config.seed, self.device)
        tokens = options.micro_batch_size * self.config.seq_len
        # Scales are multiplied in float32.
        saved = saved_activations(self.model.config, torch.float32)
        layers = self.structure.layers
        activations = saved + self._states_bytes if options.gradient_checkpointing else layers * saved
        return self._both_weights | {
            "pruned weights": (self._held_weights - removed) * self._itemsize_of_both,
            "seq_len": int(tokens * activations),
            "logits": 3 * tokens * self._vocabulary * self._trial_dtype.itemsize + 2 * self._losses_bytes,
        }

    @cached_property
    def _dtype(self) -> torch.dtype:
        return dtype_of_weights(self.model, self.config.dtype)

    @cached_property
    def _trial_dtype(self) -> torch.dtype:
        return trial_dtype(self._dtype, self.device)

    @property
    def _itemsize_of_both(self) -> int:
        """Bytes of a weight, with its copy for trials where these have another dtype."""
        return self._dtype.itemsize + (self._trial_dtype.itemsize if self._trial_dtype != self._dtype else 0)

    @cached_property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def _hidden(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def _layers(self) -> list[int]:
        """Weights of each layer."""
        return [sum(weight.numel() for weight in layer.parameters()) for layer in decoder_layers(self.model)]

    @property
    def _layer_weights(self) -> int:
        """Weights of the largest layer, where one layer at a time is in memory: it is there in one dtype, and what is
        in no layer in both."""
        return max(self._layers) if self.by_layer else 0

    @cached_property
    def _held_weights(self) -> int:
        """Weights of the dense model that a device holds."""
        weights: int = sum(weight.numel() for weight in self.model.parameters())
        largest = max(self._layers)
        if self.by_layer:
            weights -= sum(self._layers) - largest
        if self.devices > 1:
            # The first holds what is in no layer, and none holds more than a layer beyond its share.
            return max(weights // self.devices, weights - sum(self._layers)) + largest
        return weights

    @cached_property
    def _blocks(self) -> list[tuple[Block, int]]:
        return list(zip(self.structure.blocks, self.counts, strict=True))

    @cached_property
    def _pruned_weights(self) -> int:
        """Weights of the pruned model that a device holds beside the dense one. Layer by layer, nothing is shared with
        that."""
        weights = sum(n * block.parameters_per_group for block, n in self._blocks if self.by_layer or n < block.groups)
        return weights // self.devices + max(self._layers) if self.devices > 1 else weights

    @property
    def _weights(self) -> Terms:
        """Of the dense model."""
        return {"weights": self._held_weights * self._dtype.itemsize}

    @property
    def _both_weights(self) -> Terms:
        """Of the dense model and its copy for trials."""
        held, of_layer = self._held_weights, self._layer_weights
        return {"weights": (held - of_layer) * self._itemsize_of_both + of_layer * self._trial_dtype.itemsize}

    @cached_property
    def _widest(self) -> int:
        """Inputs of the block that has most."""
        return max(block.inputs for block in self.structure.blocks)

    @cached_property
    def _inputs_measured(self) -> int:
        """Inputs of all blocks, of each of which two sums are kept."""
        return sum(block.inputs for block in self.structure.blocks)

    @cached_property
    def _moments_bytes(self) -> int:
        """Bytes of the largest second moments."""
        return max(block.inputs * block.inputs_of_one for block in self.structure.blocks) * _FLOAT32

    @cached_property
    def _projection_bytes(self) -> int:
        """Bytes of the largest projection that is compensated."""
        projected = (block for block in self.structure.blocks if block.is_projected)
        return max((block.row_wise.elements * block.inputs for block in projected), default=0) * _FLOAT32

    @property
    def _solving(self) -> Terms:
        """To correct one block."""
        return {"second moments": 4 * self._moments_bytes + 3 * self._projection_bytes}

    @cached_property
    def _largest_bytes(self) -> int:
        """Bytes of the largest matrix of any block, in float32."""
        sizes = (
            part.elements * block.groups * part.width for block in self.structure.blocks for part in block.matrices
        )
        return max(sizes) * _FLOAT32

    @cached_property
    def _vectors_measured(self) -> int:
        """Rows and columns that sums are kept for."""
        return sum(part.width * block.groups for block in self.structure.blocks for part in block.matrices)

    @property
    def _pool(self) -> Terms:
        """The statistics of all samples."""
        of_sample = self._vectors_measured * (3 if self.config.terms == "all" else 1) + 2 * self._inputs_measured
        return {"pool": self.config.pool * of_sample * _FLOAT32}

    @cached_property
    def _text_bytes(self) -> int:
        """Bytes of one number for every token that second moments are from."""
        written = self.config.self_windows or 0
        if self.config.self_windows is None and not self.by_layer:
            written = self.config.compensation_windows // 2
        return (self.config.compensation_windows + written) * self.config.seq_len * self._trial_dtype.itemsize

    @property
    def _losses_bytes(self) -> int:
        """Bytes of the logits of a window and of their log-softmax, in float32."""
        return 2 * self.config.seq_len * self._vocabulary * _FLOAT32

    def _logits_bytes(self, tokens: int) -> int:
        """Bytes of what a layer computes of a batch, or of the logits after the last one, and of the losses.

        Args:
            tokens: of all batches.
        """
        of_token = max(self._vocabulary, 3 * self._widest + 4 * self._hidden) * self._trial_dtype.itemsize
        return min(tokens_per_batch(self.device), tokens) * of_token + self._losses_bytes

    @property
    def _states_bytes(self) -> int:
        """Bytes of the hidden states of a token before, between and behind all layers."""
        return (self.structure.layers + 1) * self._hidden * self._trial_dtype.itemsize

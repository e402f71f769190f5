"""The keyword arguments of `adapruner.prune`, `plan_again` and `recover`, for type checkers and editors.

The options themselves, with their defaults, ranges and explanations, are the fields of `PruneOptions` and
`RecoveryOptions`; a test compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer
from typing_extensions import TypedDict

from adapruner.callbacks import Callback
from adapruner.config import (
    Alignment,
    CompensationForm,
    Dtype,
    ExpertGranularity,
    HeadGranularity,
    Layout,
    Phase,
    PruneOptions,
    RatioOf,
    RecoveryMethod,
    RecoveryOptions,
    Reduction,
    Sampler,
    Searched,
    Selection,
    Space,
    TargetFormat,
    Terms,
    Tracker,
    TrainedWeights,
    WholePart,
)
from adapruner.given import TextData
from adapruner.search import ItemLosses


class RecoveryArguments(TypedDict, total=False):
    """The fields of `RecoveryOptions`."""

    method: RecoveryMethod
    train: TrainedWeights
    steps: int | None
    epochs: int
    records: int | None
    seq_len: int
    batch_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    learning_rate: float
    warmup_steps: int
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    temperature: float
    label_weight: float
    validation: int
    seed: int


class TargetArguments(TypedDict, total=False):
    """The fields of `PruneOptions` that replace a ratio."""

    target_size: str | None
    target_memory: str | None
    target_speed: float | None
    target_format: TargetFormat
    target_phase: Phase
    target_batch: int
    target_context: int | None


class PruneArguments(TargetArguments, total=False):
    """The fields of `PruneOptions` but for the dataset, which is an argument of its own."""

    ratio: float | Sequence[float]
    vocabulary: str | Sequence[str]
    vocabulary_size: int | None
    vocabulary_multiple: int
    ratio_of: RatioOf
    objective: TextData | ItemLosses | None
    evaluate: str | Sequence[str]
    pool: int
    samples: int
    objective_windows: int | None
    final_windows: int
    selection: Selection
    evaluate_windows: int | None
    evaluate_bos: bool
    seq_len: int
    trials: int
    level_rounds: int | None
    sampler: Sampler
    search: Searched
    alignment: Alignment
    terms: Terms
    reduction: Reduction
    space: Space
    layout: Layout
    protect_first: int | None
    protect_last: int | None
    head_granularity: HeadGranularity
    expert_granularity: ExpertGranularity
    whole: WholePart | Sequence[WholePart] | None
    head_share: float | None
    round_to: int
    compensation: CompensationForm
    compensation_windows: int
    self_windows: int | None
    sequential: bool | None
    tune_scales: bool | None
    recover: TextData | None
    recovery: RecoveryOptions | RecoveryArguments
    tasks: str | Sequence[str]
    task_limit: int | None
    sources: str | None
    plugins: str | Sequence[str]
    architectures: str | None
    device: str
    layer_wise: bool | None
    ignore_memory: bool
    dtype: Dtype
    seed: int


class RunArguments(PruneArguments, total=False):
    """What else `adapruner.prune` and `adapruner.prune_ratios` take; explained there."""

    output: str | Path | None
    tokenizer: Tokenizer | None
    config: PruneOptions | None
    recipe: str | Path | None
    overwrite: bool
    objective_version: str | None
    callbacks: Sequence[Callback]
    storage: str | None
    push_to_hub: str | None
    hub_private: bool
    hub_revision: str | None
    hub_token: str | None
    track: Tracker | None

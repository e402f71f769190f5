"""Every option, once: type, default, range, help, and what excludes what. The command line reads this module alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from adapruner.base.errors import AdaPrunerError, describe_invalid, reason
from adapruner.base.files import parse_options


def _check_fraction(value: float) -> float:
    if not 0 < value < 1:
        percent = value if 1 < value < 100 else 20
        raise ValueError(f"is not a fraction between 0 and 1: {percent / 100:g} removes {percent:g} %")
    return value


def _check_layers(value: float) -> float:
    if value >= 1 and value % 1:
        raise ValueError("is neither a number of layers nor, below 1, a share of all layers")
    return int(value) if value >= 1 or not value else value  # keys of runs hold 4 and not 4.0


def size_in_bytes(value: object) -> int:
    """Bytes of a size such as 400MB or 1.5GiB."""
    try:
        # Pydantic reads the beginning of a text, and 1 byte in 1,500MB.
        if not re.fullmatch(r"\s*(\d*\.)?\d+\s*\w*\s*", str(value)):
            raise ValueError
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValueError:
        raise ValueError("is not a size: expected a number with a unit, as 400MB or 1.5GiB") from None


def _check_size(value: object) -> str:
    if not size_in_bytes(value):
        raise ValueError("must be positive")
    return str(value)


def _check_tokens(value: object) -> str:
    """A number of tokens in digits, of one such as 300k or 2M."""
    text = str(value).strip()
    number = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMB]?)", text)
    if number is None or not 1 <= (tokens := float(number[1]) * _THOUSANDS[number[2]]) <= 1e12:
        raise ValueError("is not a number of tokens: expected one such as 300k, 2M or 1_000_000, at most 1000B")
    return str(round(tokens))


_THOUSANDS = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}

Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[str, BeforeValidator(_check_tokens)]
TokensOrNone = Annotated[str, BeforeValidator(lambda value: value if value == "none" else _check_tokens(value))]
Size = Annotated[str, BeforeValidator(_check_size)]
Fraction = Annotated[float, AfterValidator(_check_fraction)]
Layers = Annotated[float, Field(ge=0), AfterValidator(_check_layers), PlainSerializer(lambda value: value)]
# One value stands for a tuple of one.
ONE_OR_MORE = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))
Names = Annotated[tuple[str, ...], ONE_OR_MORE]


Alignment = Literal["data", "paper"]
CompensationForm = Literal["none", "least-squares"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Effort = Literal["quick", "standard", "thorough"]
ExpertGranularity = Literal["expert", "channel"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m"]
HeadGranularity = Literal["kv-group", "query-head"]
Layout = Literal["per-layer", "uniform"]
RatioOf = Literal["parameters", "decoder", "groups"]
Reduction = Literal["sum", "mean", "max", "prod"]
ServingEngine = Literal["vllm", "sglang", "llama.cpp", "mlx", "transformers", "any"]
Searched = Literal["joint", "calibration", "metric"]
Space = Literal["paper", "extended"]
TrainedWeights = Literal["lora", "ia3", "layers", "full"]


# What `effort` sets, by its value: points on the frontier of quality and time (research/results.md).
EFFORTS: dict[str, dict[str, object]] = {
    "quick": {"compensation_windows": 192, "heal": "none"},
    "standard": {},
    "thorough": {"compensation_windows": 768, "heal": "400000"},
}
# The options that only a search reads.
OF_A_SEARCH = ("objective", "pool", "samples", "objective_windows", "alignment", "reduction")
# The options for the amount to remove; a run has one of them.
BUDGETS = ("ratio", "size", "memory")
# The options for the length of a training; it has at most one of them.
TRAINING_BUDGETS = ("steps", "epochs", "tokens")
# The number of kept tokens is a multiple of this, as kernels of GPUs like it.
TOKENS_MULTIPLE = 64
# The fewest windows that judge trials, unless fewer are asked for: results on few do not carry over
# (research/experiments/windows-and-trials.md).
FEWEST_JUDGING_WINDOWS = 64
# Trials of a search for comparison; of a model with experts: its starting points.
SEARCH_TRIALS, EXPERT_TRIALS = 48, 8
# The largest seed of NumPy; numbers of tokens, windows and steps are smaller.
_LARGEST_NUMBER = 2**32 - 1


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _is_possible(cls, value: object) -> object:
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise ValueError(f"must be at most {_LARGEST_NUMBER}")
        return value

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := "; ".join(self._conflicts()):
            raise PydanticCustomError("conflict", "{conflicts}", {"conflicts": conflicts})
        return self

    def _conflicts(self) -> Iterator[str]:
        """What is wrong with options that are possible one by one."""
        yield from ()

    @classmethod
    def from_options(cls, /, **options: object) -> Self:
        """Builds the config from plain values."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise AdaPrunerError(describe_invalid(error, [*cls.model_fields])) from None


class RecoveryOptions(_Options):
    """Options of fine-tuning a pruned model; the defaults are those of LLM-Pruner and the paper."""

    train: TrainedWeights = Field(
        default="lora",
        description="Train adapters, merged at the end: those of LoRA, or with ia3 a scale for each input of a linear"
        " layer; or all weights, with layers those of the decoder layers alone.",
    )
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps, instead of epochs.")
    epochs: int | None = Field(
        default=None, ge=1, description="Passes over all examples; by default 2, without steps or tokens."
    )
    tokens: Tokens | None = Field(
        default=None, description="Tokens to train on, prompts included, such as 300k or 2M; instead of epochs."
    )
    records: int | None = Field(
        default=None,
        ge=2,
        description="Maximum number of examples of each dataset; by default all, or 1024 that the dense model writes.",
    )
    seq_len: int = Field(default=256, ge=2, description="Tokens per example; longer examples are truncated.")
    batch_size: Count = Field(default=64, description="Examples per optimizer step.")
    micro_batch_size: Count = Field(default=4, description="Examples per forward pass, limited by memory.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    optimizer: str = Field(
        default="adamw_torch_fused",
        description="Optimizer, by its name in the Trainer of transformers: adamw_8bit needs bitsandbytes, apollo_adamw"
        " apollo-torch.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=100, ge=0, description="Warm-up steps, at most a tenth of all steps.")
    lora_rank: Count = Field(default=8, description="Rank of the adapters.")
    lora_alpha: Count = Field(default=16, description="Scale of the adapters, divided by their rank.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the input of the adapters.")
    temperature: float = Field(default=1.0, gt=0, description="Softmax temperature of distillation.")
    teacher_top: int | None = Field(
        default=None,
        ge=1,
        description="Write this number of most probable tokens of the teacher to disk for every learnt token before"
        " the training, for a teacher that does not fit next to the model; by default it runs in every step.",
    )
    label_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of the label loss in distillation; the teacher has the rest, and all of the text that it"
        " wrote.",
    )
    validation: Count = Field(
        default=2000,
        description="Maximum number of examples held out to select the best weights, at most a tenth of all; and so"
        " few that validation takes little of the time, but not below 16.",
    )
    report_to: str = Field(
        default="none",
        description="Experiment tracker for the training curves, by its name in the Trainer of transformers, as wandb;"
        " tensorboard writes into the folder that the environment variable TENSORBOARD_LOGGING_DIR names.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapters and of the order of the examples.")

    def _conflicts(self) -> Iterator[str]:
        if sum(getattr(self, name) is not None for name in TRAINING_BUDGETS) > 1:
            yield "`steps`, `epochs` and `tokens` each say how long the training is: give one"


class PruneOptions(_Options):
    """Options of pruning: the amount, the datasets and the search."""

    ratio: Fraction = Field(
        default=0.2, description="Fraction of all parameters to remove, tied embeddings counted once."
    )
    effort: Effort = Field(
        default="standard",
        description="Amount of text and training: quick corrects in closed form alone; standard also trains, and"
        " reads more text; thorough does more of both. Explicit options win.",
    )
    vocabulary: Names = Field(
        default=(),
        description="Datasets whose tokens are kept: the others are removed, and what they do not give to the ratio is"
        " removed from the layers; comma-separated or repeated.",
    )
    vocabulary_size: Tokens | None = Field(
        default=None,
        description="Tokens to keep, as 32k: the most likely in text like vocabulary, by default code and English.",
    )
    ratio_of: RatioOf = Field(
        default="parameters",
        description="What the ratio is a fraction of: all parameters; those of the decoder of a multimodal model; or"
        " the heads and channels of every layer that is not protected, as in LLM-Pruner and the paper.",
    )
    calibration: str = Field(
        default="mix",
        description="Text to measure, fit and train on: mix, which the model writes itself in seven kinds; a known"
        " name, a file or hf:…; or several with their shares, as mix,notes.txt:0.5.",
    )
    objective: str | None = Field(
        default=None,
        description="Text on which the search judges, given in the same way; by default other documents of"
        " calibration.",
    )
    evaluate: Names = Field(
        default=(), description="Dataset to report perplexity on, before and after pruning; may be repeated."
    )
    pool: Count = Field(default=64, description="Calibration samples to measure.")
    samples: Count = Field(default=10, description="Calibration samples that a trial selects from the pool.")
    objective_windows: Count = Field(
        default=96,
        description=f"Held-out windows that judge every trial; down to {FEWEST_JUDGING_WINDOWS} if the text has no"
        " more.",
    )
    evaluate_bos: bool = Field(
        default=True,
        description="Begin every reported window with the token for the beginning of a text, if the tokenizer has one;"
        " LLM-Pruner and the paper do not.",
    )
    seq_len: int = Field(default=128, ge=2, description="Tokens per window.")
    trials: int | None = Field(
        default=None,
        ge=0,
        description="Trials of the search over samples and metrics; by default none, as groups are ranked by the errors"
        f" of their removal; {EXPERT_TRIALS} for a model with experts; with 0, experts are ranked in one forward"
        f" pass, by what they add to the hidden state; {SEARCH_TRIALS} where space is paper or search is not joint.",
    )
    search: Searched = Field(
        default="joint", description="Search everything, only the samples, or only the metric; for comparison."
    )
    alignment: Alignment = Field(
        default="data", description="Scale the importance terms by their means, or by the fixed factors of the paper."
    )
    reduction: Reduction = Field(default="sum", description="How the vectors of a group become one score.")
    space: Space = Field(
        default="extended",
        description="paper mixes the Taylor terms; extended mixes all terms, and removes what costs least anywhere.",
    )
    for_: Annotated[tuple[ServingEngine, ...], ONE_OR_MORE] = Field(
        default=(),
        description="Engine that will load the model: sets layout and head_share, and refuses what the engine cannot"
        " load; may be repeated; any is every engine.",
    )
    layout: Layout = Field(
        default="per-layer",
        description="Layers of different widths, or of equal widths, which every loader of the family supports.",
    )
    protect_first: Layers | None = Field(
        default=None,
        description="Layers at the input that are not pruned, or below 1 their share of all layers, at least one layer;"
        " by default 4, or as many as the ratio allows.",
    )
    protect_last: Layers | None = Field(
        default=None, description="The same at the output; by default 1, or as many as the ratio allows."
    )
    head_granularity: HeadGranularity = Field(
        default="kv-group",
        description="With GQA, remove whole KV groups, or the same number of query heads from each group.",
    )
    expert_granularity: ExpertGranularity = Field(
        default="expert", description="Of mixtures, remove whole experts, or the same number of channels from each."
    )
    remove_attention: bool | None = Field(
        default=None,
        description="Remove whole attention layers where that costs least; by default where layers would lose more than"
        " half of their channels otherwise.",
    )
    head_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Pruning of heads relative to channels: 0 none, 1 equal; by default 0 up to half of the channels,"
        " then what costs least.",
    )
    round_to: Count = Field(default=32, description="Kept MLP widths are multiples of this.")
    tensor_parallel: Count = Field(
        default=1,
        description="GPUs that share the served model: KV heads and experts are multiples of it, and widths of 8 times"
        " it; with for_ vllm or sglang, of 128 times it, as four bits need, unless another round_to is given.",
    )
    compensation: CompensationForm = Field(default="least-squares", description="Correction of the remaining weights.")
    compensation_windows: int = Field(
        default=384, ge=2, description="Maximum number of calibration windows to fit the compensation on."
    )
    heal: TokensOrNone = Field(
        default="50k",
        description="Tokens on which the pruned model is trained to predict as the dense model does, no text more than"
        " twice; or none.",
    )
    tasks: Names = Field(
        default=(),
        description="Tasks of lm-eval to report, comma-separated or repeated; commonsense is the seven of the paper,"
        " generative is GSM8K and IFEval.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of windows of each reported text and of items of each task, evenly spaced.",
    )
    sources: str | None = Field(default=None, description="YAML file with more datasets.")
    plugins: Names = Field(
        default=(), description="Plugins of installed packages that add terms, datasets or families; may be repeated."
    )
    architectures: str | None = Field(default=None, description="YAML file or folder with more model families.")
    device: str = Field(
        default="auto", description="auto, cpu, cuda, cuda:1, …; over cuda:0,cuda:1 the layers are spread."
    )
    layer_wise: bool | None = Field(
        default=None, description="Keep one decoder layer in memory at a time; by default if the model does not fit."
    )
    ignore_memory: bool = Field(default=False, description="Start although the memory estimate is more than is free.")
    dtype: Dtype = Field(
        default="auto",
        description="Dtype of the weights; auto keeps that of the checkpoint, and of a GGUF file of less than six bits"
        " is bfloat16 where the machine computes it natively, else float32.",
    )
    seed: int = Field(default=0, ge=0, description="The same seed on the same machine gives the same plan.")

    def _conflicts(self) -> Iterator[str]:
        is_extended, is_uniform = self.space == "extended", self.layout == "uniform"
        if self.trials == 0 and not (is_extended and self.search == "joint"):
            yield "`trials` 0: `space` paper and `search` calibration or metric are searches; leave `trials` out"
        if is_uniform and (self.protect_first or self.protect_last):
            yield "`layout` uniform prunes all layers equally: remove `protect_first` and `protect_last`"
        if is_uniform and self.remove_attention:
            yield "`layout` uniform prunes all layers equally: remove `remove_attention`"
        if self.remove_attention and not is_extended:
            yield "`space` paper removes no whole attention: remove `remove_attention`, or set `space` extended"
        if self.alignment == "paper" and is_extended:
            yield "`alignment` paper only supports the Taylor terms: set `space` paper"
        if self.ratio_of == "groups" and is_extended:
            yield "`ratio_of` groups leaves no allocation to search: set `space` paper"
        if (self.vocabulary or self.vocabulary_size) and self.ratio_of == "groups":
            yield "`ratio_of` groups counts no tokens: leave `vocabulary` and `vocabulary_size`, or `ratio_of`, out"
        if self.samples > self.pool:
            yield f"`samples` {self.samples} is more than the {self.pool} of `pool`: lower one or raise the other"

    @property
    def default_trials(self) -> int:
        """The number of trials; without `trials`, only what is there for comparison searches."""
        if self.trials is not None:
            return self.trials
        return 0 if (self.space, self.search) == ("extended", "joint") else SEARCH_TRIALS


def allocates_by_cost(space: str, layout: str, ratio_of: str, head_share: float | None) -> bool:
    """True if what each layer loses follows from its cost, and not from options."""
    return (space, layout) == ("extended", "per-layer") and ratio_of != "groups" and not head_share


class SizeLimit(_Options):
    """A maximum size or memory of the pruned model, instead of a ratio."""

    size: Size | None = Field(
        default=None, description="Maximum size of the weights of the pruned model, as 400MB or 1.5GiB."
    )
    memory: Size | None = Field(
        default=None, description="Maximum memory to serve it in: weights and KV cache, as 12GB."
    )
    context: Count = Field(default=2048, description="Tokens of each sequence in that cache.")
    batch: Count = Field(default=1, description="Sequences in that cache.")

    def _conflicts(self) -> Iterator[str]:
        if (self.context, self.batch) != (2048, 1) and self.memory is None:
            yield "`context` and `batch` are those of a KV cache: add `memory`"


class RecoverConfig(RecoveryOptions):
    """Everything that a standalone recovery depends on."""

    model: str
    data: str
    teacher: str | None = None
    dtype: Dtype = "auto"

    def _conflicts(self) -> Iterator[str]:
        yield from super()._conflicts()
        if self.teacher_top is not None and self.teacher is None:
            yield "`teacher_top` needs the dense model: add `teacher`"


class PruneConfig(PruneOptions):
    """Everything that a run depends on: the model and the options.

    Attributes:
        given: the options that somebody gave; the others are defaults, some of which follow from these and from the
            model.
        searched: the ratio of the search, if that was taken from an earlier run.
    """

    model: str = Field(description="Hub id, model folder, .gguf file, or smollm2.")
    given: tuple[str, ...] = ()
    searched: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_of_today(cls, data: dict[str, object]) -> dict[str, object]:
        """Runs of 0.2.0 have an option with this value, which is what is done without it."""
        return {name: value for name, value in data.items() if (name, value) != ("terms", "all")}

    def save(self, path: Path) -> None:
        """Writes the resolved options as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            AdaPrunerError: the file is not a config of this version.
        """
        try:
            return cls.from_options(**parse_options(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AdaPrunerError) as error:
            raise AdaPrunerError(f"{path} is not the config of a run: {reason(error)}") from error

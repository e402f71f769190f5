"""Every option of a pruning run, once: type, default, range, help. The command line reads this module alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from adapruner.errors import AdaPrunerError, describe_invalid, reason
from adapruner.plain_yaml import PlainLoader

Alignment = Literal["data", "paper"]
CompensationForm = Literal["none", "bias", "least-squares", "least-squares-bias"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["transformers", "llama.cpp"]
ExpertGranularity = Literal["expert", "channel"]
ExportFormat = Literal["gguf", "stock"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m"]
HeadGranularity = Literal["kv-group", "query-head"]
Layout = Literal["per-layer", "uniform"]
RatioOf = Literal["parameters", "groups"]
RecoveryMethod = Literal["auto", "labels", "distillation"]
Reduction = Literal["sum", "mean", "max", "prod"]
Sampler = Literal["tpe", "random"]
WholePart = Literal["attention", "feed-forward", "layer", "none"]
Searched = Literal["joint", "calibration", "metric"]
Selection = Literal["loss", "kl"]
Space = Literal["paper", "extended"]
Terms = Literal["all", "vector-wise"]
Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]
TrainedWeights = Literal["lora", "full"]


def _check_fraction(value: float) -> float:
    if not 0 < value < 1:
        percent = value if 1 < value < 100 else 20
        raise ValueError(f"is not a fraction between 0 and 1: {percent / 100:g} removes {percent:g} %")
    return value


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(values)) < max(len(values), 1):
        raise ValueError("must be one or more different fractions")
    return tuple(sorted(values))


Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, AfterValidator(_check_fraction)]
# One value stands for a tuple of one.
_OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))
Ratios = Annotated[tuple[Fraction, ...], _OneOrMore, AfterValidator(_ascending)]
Names = Annotated[tuple[str, ...], _OneOrMore]

# What the option `objective` begins with where it stands for a function of the user.
FUNCTION = "python:"

# The largest seed of NumPy; nobody has so many tokens, windows or steps either.
_LARGEST_NUMBER = 2**32 - 1


def _searches_widths(ratio_of: RatioOf, search: Searched, space: Space, layout: Layout) -> bool:
    """Whether the search decides how many channels each layer keeps."""
    return (ratio_of, search, space, layout) == ("parameters", "joint", "extended", "per-layer")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    # Combinations of fields that are refused: a test of the fields that it has as parameters, and a message.
    _conflicts: ClassVar[tuple[tuple[Callable[..., Any], str], ...]] = ()

    @field_validator("*")
    @classmethod
    def _is_possible(cls, value: Any, info: ValidationInfo) -> Any:
        """Finds a conflict at the last of its fields, if the others are valid: all errors are told at once."""
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise ValueError(f"must be at most {_LARGEST_NUMBER}")
        known, found = {**info.data, str(info.field_name): value}, []
        for test, message in cls._conflicts:
            fields = inspect.signature(test).parameters.keys()
            if info.field_name in fields and fields <= known.keys() and test(*(known[name] for name in fields)):
                found.append(message.format(**known))
        if found:
            raise PydanticCustomError("conflict", "{conflicts}", {"conflicts": "; ".join(found)})
        return value

    @classmethod
    def from_options(cls, /, **options: Any) -> Self:
        """Builds the config from plain values.

        Raises:
            AdaPrunerError: options are unknown, of the wrong type or out of range, or conflict.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            nested = [f"recovery.{name}" for name in RecoveryOptions.model_fields if "recovery" in cls.model_fields]
            raise AdaPrunerError(describe_invalid(error, [*cls.model_fields, *nested])) from None


class RecoveryOptions(_Options):
    """How a pruned model is fine-tuned; the defaults are those of LLM-Pruner and the paper."""

    method: RecoveryMethod = Field(
        default="auto",
        description="Train on the labels, or distil the predictions of the dense model; auto distils if a teacher is"
        " given for plain text or the model generated the text.",
    )
    train: TrainedWeights = Field(default="lora", description="Train LoRA adapters, merged at the end, or all weights.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; replaces the epochs.")
    epochs: Count = Field(default=2, description="Passes over the dataset.")
    records: int | None = Field(default=None, ge=2, description="Maximum number of records, or windows of plain text.")
    seq_len: int = Field(default=256, ge=2, description="Tokens per example; longer examples are truncated.")
    batch_size: Count = Field(default=64, description="Examples per optimizer step.")
    micro_batch_size: Count = Field(default=4, description="Examples per forward pass, limited by memory.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=100, ge=0, description="Warm-up steps, at most a tenth of all steps.")
    lora_rank: Count = Field(default=8, description="Rank of the adapters.")
    lora_alpha: Count = Field(default=16, description="Scale of the adapters, divided by their rank.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the input of the adapters.")
    temperature: float = Field(default=1.0, gt=0, description="Softmax temperature of distillation.")
    label_weight: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the label loss in distillation; the teacher has the rest."
    )
    validation: Count = Field(
        default=2000, description="Examples held out to select the best weights, at most a tenth of all."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapters and of the order of the examples.")

    def learns_labels(self, instructions: bool, has_teacher: bool) -> bool:
        """Whether the model is trained on the labels, and not on the predictions of a teacher."""
        if self.method == "auto":
            return instructions or not has_teacher
        return self.method == "labels"


class PruneOptions(_Options):
    """How much of a model is pruned, on which datasets, and how it is searched."""

    ratio: Ratios = Field(
        default=(0.2,),
        description="Fraction of all parameters to remove, tied embeddings counted once; repeat it for several models.",
    )
    vocabulary: Names = Field(
        default=(),
        description="Datasets whose tokens are kept, comma-separated or repeated; the others are removed and count"
        " towards the ratio. By default all tokens are kept.",
    )
    vocabulary_size: int | None = Field(
        default=None, ge=1, description="Maximum number of tokens to keep, the most frequent ones."
    )
    vocabulary_multiple: Count = Field(
        default=64, description="The number of kept tokens is rounded up to a multiple of this."
    )
    ratio_of: RatioOf = Field(
        default="parameters",
        description="What the ratio is a fraction of: all parameters, or the heads and channels of every layer that is"
        " not protected, as in LLM-Pruner and the paper.",
    )
    calibration: str = Field(
        default="c4", description="Calibration dataset: a known name, a file, hf:…, or self (the model generates it)."
    )
    objective: str | None = Field(
        default=None,
        description="Dataset whose loss the search minimises; by default other documents of the calibration dataset.",
    )
    evaluate: Names = Field(
        default=(), description="Dataset to report perplexity on, before and after pruning; may be repeated."
    )
    pool: Count = Field(default=64, description="Calibration samples to measure.")
    samples: Count = Field(default=10, description="Calibration samples that a trial selects from the pool.")
    objective_windows: Count = Field(default=64, description="Held-out windows that score every trial.")
    final_windows: int = Field(
        default=64, ge=0, description="Further held-out windows, if available, that score the best trials again."
    )
    selection: Selection = Field(
        default="loss", description="Score trials by the loss, or by the KL divergence from the dense model."
    )
    evaluate_windows: int | None = Field(
        default=None, ge=1, description="Maximum number of windows, evenly spaced, for the reported perplexity."
    )
    evaluate_bos: bool = Field(
        default=True,
        description="Begin every reported window with the token for the beginning of a text, if the tokenizer has one;"
        " LLM-Pruner and the paper do not.",
    )
    seq_len: int = Field(default=128, ge=2, description="Tokens per window.")
    trials: Count = Field(default=48, description="Trials of the search.")
    level_rounds: int | None = Field(
        default=None,
        ge=0,
        description="Maximum number of rounds after the search that move channels to layers where they are worth more;"
        " by default 2, none with layer_wise or where the allocation is not searched.",
    )
    sampler: Sampler = Field(default="tpe", description="Sampler of the search; random is for comparison.")
    search: Searched = Field(
        default="joint", description="Search everything, only the samples, or only the metric; for comparison."
    )
    alignment: Alignment = Field(
        default="data", description="Scale the importance terms by their means, or by the fixed factors of the paper."
    )
    terms: Terms = Field(
        default="all", description="Importance terms to measure; vector-wise omits the gradients of single weights."
    )
    reduction: Reduction = Field(default="sum", description="How the vectors of a group become one score.")
    space: Space = Field(
        default="extended",
        description="paper mixes the Taylor terms; extended mixes all terms and searches the allocation.",
    )
    layout: Layout = Field(
        default="per-layer",
        description="Layers of different widths, or of equal widths, which every loader of the family supports.",
    )
    protect_first: int | None = Field(
        default=None, ge=0, description="Layers at the input that are not pruned; by default searched, or 4."
    )
    protect_last: int | None = Field(
        default=None, ge=0, description="Layers at the output that are not pruned; by default searched, or 3."
    )
    head_granularity: HeadGranularity = Field(
        default="kv-group",
        description="With GQA, remove whole KV groups, or the same number of query heads from each group.",
    )
    expert_granularity: ExpertGranularity = Field(
        default="expert", description="Of mixtures, remove whole experts, or the same number of channels from each."
    )
    whole: Annotated[tuple[WholePart, ...], _OneOrMore] | None = Field(
        default=None,
        description="Part of a layer that may be removed whole, if the search finds that better: attention,"
        " feed-forward, layer, or none; may be repeated; by default attention, with layout uniform layer.",
    )
    head_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Pruning of heads relative to channels: 0 none, 1 equal; by default searched, or 0.",
    )
    round_to: Count = Field(default=32, description="Kept MLP widths are multiples of this.")
    compensation: CompensationForm = Field(
        default="least-squares",
        description="How the remaining weights are corrected; the forms with bias add parameters.",
    )
    compensation_windows: int = Field(
        default=512, ge=2, description="Maximum number of calibration windows to fit the compensation on."
    )
    self_windows: int | None = Field(
        default=None,
        ge=0,
        description="Windows that the model generates itself and that the compensation is fitted on as well, so that it"
        " also holds for other text; by default half of compensation_windows, with layer_wise none.",
    )
    sequential: bool | None = Field(
        default=None,
        description="Fit the final model again, layer by layer, on the outputs of the pruned layers before; by default"
        " if no bias is added.",
    )
    recover: str | None = Field(
        default=None,
        description="Dataset to fine-tune the pruned model on: instructions with answers, or any text.",
    )
    recovery: RecoveryOptions = RecoveryOptions()
    tasks: Names = Field(
        default=(),
        description="Tasks of lm-eval to report, comma-separated or repeated; commonsense is the seven of the paper,"
        " generative is GSM8K and IFEval.",
    )
    task_limit: int | None = Field(default=None, ge=1, description="Maximum number of items per task, evenly spaced.")
    sources: str | None = Field(default=None, description="YAML file with more datasets.")
    plugins: Names = Field(
        default=(), description="Plugins of installed packages that add terms, datasets or families; may be repeated."
    )
    architectures: str | None = Field(default=None, description="YAML file or folder with more model families.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    layer_wise: bool | None = Field(
        default=None, description="Keep one decoder layer in memory at a time; by default if the model does not fit."
    )
    dtype: Dtype = Field(default="auto", description="Dtype of the weights; auto keeps the dtype of the checkpoint.")
    seed: int = Field(default=0, ge=0, description="The same seed on the same machine gives the same plan.")

    @property
    def objective_function(self) -> str | None:
        """The name and version of the Python function that judges the trials; None for the loss on a dataset."""
        is_function = self.objective is not None and self.objective.startswith(FUNCTION)
        return self.objective if is_function else None

    @property
    def objective_dataset(self) -> str:
        """The dataset whose windows are those of the objective."""
        return self.calibration if self.objective is None or self.objective_function else self.objective

    @property
    def levels_widths(self) -> bool:
        """Whether the widths are levelled after the search, if all layers are in memory."""
        return self.level_rounds != 0 and _searches_widths(self.ratio_of, self.search, self.space, self.layout)

    @property
    def fits_sequentially(self) -> bool:
        """Whether the final model is fitted again, layer by layer, if the family allows it."""
        if self.sequential is None:
            return self.compensation == "least-squares"
        return self.sequential


class RecoverConfig(RecoveryOptions):
    """Everything that a standalone recovery depends on."""

    model: str
    data: str
    teacher: str | None = None
    dtype: Dtype = "auto"

    _conflicts = (
        (
            lambda method, teacher: method == "distillation" and teacher is None,
            "`method` distillation needs the dense model: add `teacher`",
        ),
        (
            lambda method, teacher: method == "labels" and teacher is not None,
            "`method` labels needs no teacher: remove `teacher`",
        ),
    )


class PruneConfig(PruneOptions):
    """Everything that a run depends on: the model and the options.

    Attributes:
        search_ratio: the ratio that the search was done at, where it is another than that of the plan.
    """

    model: str = Field(description="Hub id, model folder, .gguf file, or smollm2.")
    search_ratio: Fraction | None = None

    _conflicts = (
        (
            lambda ratio_of, search, space, layout, level_rounds: (
                level_rounds and not _searches_widths(ratio_of, search, space, layout)
            ),
            "`level_rounds` moves widths that the search chose: remove it, or set `space` extended, `search` joint,"
            " `layout` per-layer and `ratio_of` parameters",
        ),
        (
            lambda calibration, self_windows: calibration == "self" and self_windows,
            "with `calibration` self the model generates all windows: remove `self_windows`",
        ),
        (
            lambda layout, protect_first, protect_last: layout == "uniform" and (protect_first or protect_last),
            "`layout` uniform prunes all layers alike: remove `protect_first` and `protect_last`",
        ),
        (
            lambda layout, whole: layout == "uniform" and set(whole or ()) & {"attention", "feed-forward"},
            "`layout` uniform prunes all layers alike: `whole` can only be layer or none",
        ),
        (
            lambda space, whole: space == "paper" and set(whole or ()) - {"none"},
            "`space` paper removes nothing whole: remove `whole`, or set `space` extended",
        ),
        (
            lambda whole: "none" in (whole or ()) and len(whole) > 1,
            "`whole` is either none or parts of a layer: remove one or the other",
        ),
        (
            lambda alignment, space: alignment == "paper" and space == "extended",
            "`alignment` paper only knows the Taylor terms: set `space` paper",
        ),
        (
            lambda ratio_of, space: ratio_of == "groups" and space == "extended",
            "`ratio_of` groups leaves no allocation to search: set `space` paper",
        ),
        (
            lambda sequential, compensation: sequential and compensation != "least-squares",
            "`sequential` needs `compensation` least-squares, not {compensation}",
        ),
        (
            lambda vocabulary, vocabulary_size: vocabulary_size is not None and not vocabulary,
            "`vocabulary_size` needs text to count tokens in: add `vocabulary`",
        ),
        (
            lambda recover, recovery: recover is None and recovery != RecoveryOptions(),
            "options of the recovery need a dataset to fine-tune on: add `recover`",
        ),
        (
            lambda samples, pool: samples > pool,
            "`samples` {samples} is more than the {pool} of `pool`: lower one or raise the other",
        ),
    )

    @property
    def searched_ratio(self) -> float:
        """The ratio that the search is done at."""
        return self.search_ratio or self.ratio[0]

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
            return cls.from_options(**_parse_options(path.read_text(encoding="utf-8")))
        except (*_UNREADABLE, AdaPrunerError) as error:
            raise AdaPrunerError(f"{path} is not the config of a run: {reason(error)}") from error


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The options in a recipe: one of this package, by name, or a YAML file.

    Raises:
        AdaPrunerError: there is no such recipe, or it is not a mapping of options.
    """
    folder = resources.files("adapruner") / "recipes"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
    file = folder / f"{name}.yaml" if str(name) in known else Path(name)
    try:
        if not file.is_file():
            raise AdaPrunerError(f"no recipe {str(name)!r}: expected {', '.join(known)}, or a YAML file")
        return _parse_options(file.read_text(encoding="utf-8"))
    except _UNREADABLE as error:
        raise AdaPrunerError(f"cannot read the recipe {name}: {reason(error)}") from None


# What reading and parsing a file raise, also for invalid numbers and dates and endless nesting.
_UNREADABLE = (OSError, yaml.YAMLError, ValueError, RecursionError)


def _parse_options(text: str) -> dict[str, Any]:
    """Options and their values out of YAML.

    Raises:
        YAMLError, ValueError, RecursionError: it is something else.
    """
    options = yaml.load(text, PlainLoader)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is not a mapping of options to values")
    return options

"""Every option of a pruning run, once: type, default, range, help. The command line reads this class too."""

from __future__ import annotations

import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from adapruner.errors import AdaPrunerError, reason
from adapruner.plain_yaml import PlainLoader

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Seeds of NumPy end here, and nobody has so many tokens, windows or steps.
_LARGEST_NUMBER = 2**32 - 1


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_no_absurd_number(cls, value: Any) -> Any:
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise ValueError(f"Input should be less than {_LARGEST_NUMBER + 1}")
        return value


class RecoveryOptions(_Options):
    """How a pruned model is trained again; the defaults are those of LLM-Pruner and the paper."""

    method: Annotated[
        Literal["auto", "labels", "distillation"],
        Field(
            description="Learn the text itself or the predictions of the dense model on it; auto: the predictions where"
            " a teacher is named for plain text or the model wrote the text, else the text."
        ),
    ] = "auto"
    train: Annotated[
        Literal["lora", "full"], Field(description="Low-rank adapters, merged at the end, or all weights.")
    ] = "lora"
    steps: Annotated[int | None, Field(ge=1, description="Steps of the optimizer, in place of --epochs.")] = None
    epochs: Annotated[int, Field(ge=1, description="Passes over the data.")] = 2
    records: Annotated[
        int | None, Field(ge=2, description="Take at most so many records, or windows of plain text.")
    ] = None
    seq_len: Annotated[int, Field(ge=2, description="Tokens of an example; longer ones are cut off.")] = 256
    batch_size: Annotated[int, Field(ge=1, description="Examples per step.")] = 64
    micro_batch_size: Annotated[int, Field(ge=1, description="Examples at once, as many as fit into memory.")] = 4
    learning_rate: Annotated[float, Field(gt=0, description="At its highest, after the warm-up.")] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0, description="Steps of warm-up, at most a tenth of all.")] = 100
    lora_rank: Annotated[int, Field(ge=1, description="Rank of the adapters.")] = 8
    lora_alpha: Annotated[int, Field(ge=1, description="Scale of the adapters, divided by their rank.")] = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the adapters.")] = 0.05
    temperature: Annotated[float, Field(gt=0, description="Softens predictions in distillation.")] = 1.0
    label_weight: Annotated[
        float, Field(ge=0, le=1, description="Share of the loss of the text itself in distillation.")
    ] = 0.0
    validation: Annotated[
        int, Field(ge=1, description="Examples kept back to choose the best weights by, at most a tenth.")
    ] = 2000
    seed: Annotated[int, Field(ge=0, description="Order of the examples and start of the adapters.")] = 0

    def learns_labels(self, instructions: bool, has_teacher: bool) -> bool:
        """Whether the text itself is learnt, and not what a teacher predicts."""
        if self.method == "auto":
            return instructions or not has_teacher
        return self.method == "labels"


class PruneOptions(_Options):
    """By how much a model is pruned, on what text, and how the best way is searched."""

    ratio: Annotated[
        float, Field(gt=0, lt=1, description="Share of all parameters to remove (embeddings counted, tied ones once).")
    ] = 0.2
    ratio_of: Annotated[
        Literal["parameters", "groups"],
        Field(
            description="What the ratio is a share of: all parameters, or the heads and channels of every layer that is"
            " not protected, as LLM-Pruner and the paper count."
        ),
    ] = "parameters"
    calibration: Annotated[
        str, Field(description="Text to calibrate on: a known name, a file, hf:…, or self (the model writes it).")
    ] = "c4"
    objective: Annotated[
        str | None,
        Field(description="Text whose loss the search minimises; by default other documents of the calibration text."),
    ] = None
    evaluate: Annotated[
        tuple[str, ...], Field(description="Text to report perplexity on, before and after; may be repeated.")
    ] = ()
    pool: Annotated[int, Field(ge=1, description="Calibration samples that are measured.")] = 64
    samples: Annotated[int, Field(ge=1, description="Calibration samples that a trial chooses out of the pool.")] = 10
    objective_windows: Annotated[int, Field(ge=1, description="Held-out windows on which every trial is judged.")] = 64
    final_windows: Annotated[
        int, Field(ge=0, description="Further held-out windows, if there are, on which the best few are judged again.")
    ] = 64
    selection: Annotated[
        Literal["loss", "kl"],
        Field(description="Judge trials by the loss on the text or by the divergence from the dense model."),
    ] = "loss"
    evaluate_windows: Annotated[
        int | None, Field(ge=1, description="Limit the reported perplexity to so many evenly spaced windows.")
    ] = None
    seq_len: Annotated[int, Field(ge=2, description="Tokens per window.")] = 128
    trials: Annotated[int, Field(ge=1, description="Points of the search space that are tried.")] = 48
    sampler: Annotated[
        Literal["tpe", "random"], Field(description="How points are proposed; random is for comparison.")
    ] = "tpe"
    search: Annotated[
        Literal["joint", "calibration", "metric"],
        Field(description="What is searched: all, or only samples or metric, the rest held; for comparison."),
    ] = "joint"
    alignment: Annotated[
        Literal["data", "paper"],
        Field(description="Scale of the importance terms: by their means, or by the fixed factors of the paper."),
    ] = "data"
    terms: Annotated[
        Literal["all", "vector-wise"],
        Field(description="Importance terms to measure; vector-wise leaves out the gradients of single weights."),
    ] = "all"
    reduction: Annotated[
        Literal["sum", "mean", "max", "prod"], Field(description="How the vectors of a group become one score.")
    ] = "sum"
    space: Annotated[
        Literal["paper", "extended"],
        Field(description="paper mixes the Taylor terms; extended mixes all terms and searches the allocation."),
    ] = "extended"
    layout: Annotated[
        Literal["per-layer", "uniform"],
        Field(description="Layers of different sizes, or all alike, which any reader of the model family can load."),
    ] = "per-layer"
    protect_first: Annotated[
        int | None, Field(ge=0, description="Layers at the input that stay whole; by default searched, or 4.")
    ] = None
    protect_last: Annotated[
        int | None, Field(ge=0, description="Layers at the output that stay whole; by default searched, or 3.")
    ] = None
    head_granularity: Annotated[
        Literal["kv-group", "query-head"],
        Field(description="Under GQA, remove whole KV groups, or the same number of query heads from each."),
    ] = "kv-group"
    head_share: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Share of heads removed relative to channels: 0 no heads, 1 equal; by default searched, or 0.",
        ),
    ] = None
    round_to: Annotated[int, Field(ge=1, description="Kept feed-forward widths are multiples of this.")] = 32
    compensation: Annotated[
        Literal["none", "bias", "least-squares", "least-squares-bias"],
        Field(description="How what stays makes up for what went; the forms with bias add parameters."),
    ] = "least-squares"
    compensation_windows: Annotated[
        int,
        Field(ge=2, description="Windows of calibration text that compensation is fitted on, if there are so many."),
    ] = 768
    sequential: Annotated[
        bool | None,
        Field(
            description="Fit the final model once more, layer by layer, on what the pruned layers before produce; by"
            " default where layers differ and no bias is added."
        ),
    ] = None
    recover: Annotated[
        str | None,
        Field(description="Train the pruned model afterwards, on instructions with answers or on any text."),
    ] = None
    recovery: RecoveryOptions = RecoveryOptions()
    tasks: Annotated[
        tuple[str, ...],
        Field(
            description="Tasks of lm-eval to report, with commas or repeated; commonsense is the seven of the paper."
        ),
    ] = ()
    task_limit: Annotated[int | None, Field(ge=1, description="Take so many evenly spaced items of each task.")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, …")] = "auto"
    layer_wise: Annotated[
        bool | None,
        Field(
            description="Keep one decoder layer at a time in memory, the others in their files; by default where the"
            " model does not fit."
        ),
    ] = None
    dtype: Annotated[Dtype, Field(description="Dtype of the weights; auto keeps that of the checkpoint.")] = "auto"
    seed: Annotated[int, Field(ge=0, description="Same seed, same machine: same plan.")] = 0

    @property
    def fits_sequentially(self) -> bool:
        """Whether the final model is fitted once more, layer by layer, if the family allows it."""
        if self.sequential is None:
            return self.compensation == "least-squares" and self.layout == "per-layer"
        return self.sequential


class RecoverConfig(RecoveryOptions):
    """Everything that a recovery by itself depends on."""

    model: str
    data: str
    teacher: str | None = None
    dtype: Dtype = "auto"

    @classmethod
    def from_options(cls, /, **options: Any) -> Self:
        """Builds the config from plain values.

        Raises:
            AdaPrunerError: an option is unknown, of the wrong type or out of range, or they do not go together.
        """
        return _validated(cls, options)

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.method == "distillation" and self.teacher is None:
            raise ValueError("--method distillation learns from the dense model: name it with --teacher")
        if self.method == "labels" and self.teacher is not None:
            raise ValueError("--method labels needs no teacher: leave --teacher out")
        return self


class PruneConfig(PruneOptions):
    """Everything that a run depends on: the model and the options."""

    model: Annotated[str, Field(description="Hub id, model folder, .gguf file, or smollm2.")]

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.layout == "uniform" and (self.protect_first or self.protect_last):
            raise ValueError("--layout uniform makes all layers alike: it cannot protect some, leave --protect-… out")
        if self.alignment == "paper" and self.space == "extended":
            raise ValueError("--alignment paper only knows the Taylor terms: add --space paper")
        if self.ratio_of == "groups" and self.space == "extended":
            raise ValueError("--ratio-of groups leaves no allocation to search: add --space paper")
        if self.sequential and self.compensation != "least-squares":
            raise ValueError(f"--sequential goes with --compensation least-squares, not {self.compensation}")
        return self

    @model_validator(mode="after")
    def _recovery_is_asked_for(self) -> Self:
        if self.recover is None and self.recovery != RecoveryOptions():
            raise ValueError("--recovery.… says how to train, but not on what: add --recover SRC")
        return self

    @model_validator(mode="after")
    def _samples_fit_the_pool(self) -> Self:
        if self.samples > self.pool:
            raise ValueError(
                f"--samples {self.samples} is more than the pool of {self.pool} holds: raise --pool or choose fewer"
            )
        return self

    def save(self, path: Path) -> None:
        """Writes the resolved options as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            AdaPrunerError: the file is not a config of this version.
        """
        try:
            return _validated(cls, _parse_options(path.read_text(encoding="utf-8")))
        except (*_UNREADABLE, AdaPrunerError) as error:
            raise AdaPrunerError(f"{path} is not the config of a run: {reason(error)}") from error

    @classmethod
    def from_options(cls, /, **options: Any) -> Self:
        """Builds the config from plain values.

        Raises:
            AdaPrunerError: an option is unknown, of the wrong type or out of range.
        """
        return _validated(cls, options)


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The options in a recipe: one that comes with the package, by name, or a YAML file.

    Raises:
        AdaPrunerError: there is none of that name, or it is not a list of options.
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


# What reading a file and parsing it raise, numbers and dates that are none and endless nesting included.
_UNREADABLE = (OSError, yaml.YAMLError, ValueError, RecursionError)


def _parse_options(text: str) -> dict[str, Any]:
    """Options and their values out of YAML.

    Raises:
        YAMLError, ValueError, RecursionError: it is something else.
    """
    options = yaml.load(text, PlainLoader)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("it is no list of options with their values")
    return options


_Config = TypeVar("_Config", bound=BaseModel)


def _validated(cls: type[_Config], options: dict[str, Any]) -> _Config:
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        raise AdaPrunerError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """The first thing that is wrong with the options, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    option = ".".join(str(part) for part in first["loc"] if isinstance(part, str)).replace("_", "-")
    given = first["input"]
    return f"--{option} {given if isinstance(given, str) else _BRIEF.repr(given)}: {message}"


class _Brief(reprlib.Repr):
    """Shows the beginning of what is long or nested; Python refuses to print numbers of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= 64 else f"{hex(x)[:20]}…"


_BRIEF = _Brief()

"""One model without a run: load, inspect, measure its speed; and the steps of pruning one by one, in memory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError, first_problem
from adapruner.base.files import output_path, write_text
from adapruner.base.progress import Reporter
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.speed import Speed, measure_speed
from adapruner.families import learn, open_config, open_model, resolve
from adapruner.families.proof import failed_parts
from adapruner.importance import LLM_PRUNER_METRICS, MetricPoint, score_groups
from adapruner.measurement.moments import measure_moments
from adapruner.measurement.taylor import Statistics
from adapruner.model import loading as _loading
from adapruner.model.architecture import Architecture, check_length, check_windows, register_architectures
from adapruner.model.config import find_wrapper, load_config
from adapruner.model.loading import empty_model, in_fastest_dtype, resolve_device
from adapruner.model.places import find_model
from adapruner.options import Dtype, ExpertGranularity, HeadGranularity
from adapruner.structure.blocks import Structure, count_parameters
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.windows import draw_windows


def make_windows(
    documents: Iterable[str], tokenizer: Tokenizer, count: int = 64, seq_len: int = 128, seed: int = 0
) -> Tensor:
    """Windows of tokens from one or several documents: the beginnings, in random order, then the rest of long ones.

    Args:
        count: number of windows.
        seq_len: tokens per window.

    Returns:
        [count, seq_len], int64; the same for the same seed.

    Raises:
        AdaPrunerError: there is too little text.
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    return draw_windows(documents, tokenizer, count, seq_len, seed)


def score(
    statistics: Statistics, structure: Structure, metric: str | Mapping[str, float] | MetricPoint = "param_first"
) -> Tensor:
    """The importance of every group: every head, channel or expert.

    Args:
        metric: a metric of LLM-Pruner by name (`vectorize`, `param_first`, `param_second`, `param_mix`), weights of
            importance terms by name, or a `MetricPoint`.

    Returns:
        [groups], float64, in the order of `structure.blocks`; larger is more important. Scores of your own have this
        shape: `scores.split([block.groups for block in structure.blocks])` gives the scores of each block.
        `PruningPlan.from_scores` makes a plan of them.

    Raises:
        AdaPrunerError: there is no such metric, or a term needs statistics that were not measured.
    """
    if isinstance(metric, str):
        if metric not in LLM_PRUNER_METRICS:
            raise AdaPrunerError(f"no metric {metric!r}: expected {', '.join(LLM_PRUNER_METRICS)}, or weights of terms")
        metric = LLM_PRUNER_METRICS[metric]
    try:
        point = metric if isinstance(metric, MetricPoint) else MetricPoint(weights=dict(metric))
    except ValidationError as error:
        raise AdaPrunerError(f"the metric is not weights of terms: {first_problem(error)}") from None
    return score_groups(statistics, structure, point)


def cut(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """A new, smaller model without the groups that the plan removes.

    Weights from which nothing is removed are shared with the given model, which is not changed. Save it with its
    tokenizer by `checkpoint.save_checkpoint`, or by `save_pretrained` if all layers have the same sizes.

    Raises:
        AdaPrunerError: the plan is for another model.
    """
    return prune_model(model, structure, plan)


def compensate(model: PreTrainedModel, structure: Structure, plan: PruningPlan, windows: Tensor) -> PreTrainedModel:
    """The model that `cut` gives, with the remaining weights of the output projections corrected in closed form.

    Args:
        model: the dense model, which is not changed.
        windows: [windows, tokens], int64, at least 2; more text gives a better model.

    Raises:
        AdaPrunerError: the plan is for another model, the model is in training mode, the windows are not of its tokens,
            or there are fewer than two.
        NonFiniteError: activations are not finite.
    """
    check_windows(windows, "windows", model)
    moments = dict(measure_moments(in_fastest_dtype(model), structure, windows))
    return prune_model(model, structure, plan, moments)


def inspect(
    model: str | Path | PreTrainedModel,
    head_granularity: HeadGranularity = "kv-group",
    expert_granularity: ExpertGranularity = "expert",
) -> Structure:
    """The prunable parts of a model, from its config alone.

    Args:
        model: as for `load`, or a model in memory.
        head_granularity, expert_granularity: as in `PruneOptions`.

    Raises:
        AdaPrunerError: there is no such model, or its family is not known.
    """
    if isinstance(model, PreTrainedModel):
        learn(config := model.config)
    else:
        config = open_config(find_model(model))
    return build_structure(empty_model(config), head_granularity, expert_granularity)


def multimodal(model: str | Path) -> tuple[str, int] | None:
    """The type and the number of parameters of the multimodal model whose decoder `inspect` shows; None for a text
    model."""
    location = find_model(model)
    wrapper = find_wrapper(location)
    if wrapper is None:
        return None
    return wrapper.config.model_type, count_parameters(wrapper.around(open_config(location)))


def describe(model: str | Path) -> Architecture:
    """The family of a model, from its config alone: as a file describes it, or as it was inferred and proven.

    Raises:
        AdaPrunerError: there is no such model, or its family cannot be pruned.
    """
    return resolve(load_config(find_model(model)))


def check_described(model: str | Path, file: str | Path) -> None:
    """Registers the families that a file or folder describes, and checks the family of a model on a tiny one.

    Raises:
        AdaPrunerError: the file is invalid, describes other families, or a check fails; with the part and the reason.
    """
    families, config = register_architectures(Path(file)), load_config(find_model(model))
    if config.model_type not in families:
        raise AdaPrunerError(f"{file} describes {', '.join(families)}, not {config.model_type}, the family of {model}")
    if failures := failed_parts(config, resolve(config)):
        reasons = "; ".join(f"{part}: {failure}" for part, failure in failures.items())
        raise AdaPrunerError(f"the description of {config.model_type} in {file} is wrong ({reasons})")


def load(model: str | Path, dtype: Dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Loads a pruned or a dense model, ready to `generate`.

    Args:
        model: hub id, model folder (as in `RUN/model`), `.gguf` file, or `smollm2`.
        dtype: `auto` keeps the dtype of the checkpoint.
        device: `auto` uses the first GPU if there is one, else the CPU; over `cuda:0,cuda:1` the layers are spread.

    Raises:
        AdaPrunerError: there is no such model, or it cannot be read.
    """
    return open_model(find_model(model), dtype, device)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Loads the tokenizer of a model.

    Args:
        model: as for `load`.

    Raises:
        AdaPrunerError: there is no such model, or its tokenizer cannot be read.
    """
    return _loading.load_tokenizer(find_model(model))


def benchmark(
    model: str | Path,
    against: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    prompt: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    dtype: Dtype = "auto",
    device: str = "auto",
    output: str | Path | None = None,
) -> dict[str, Speed]:
    """Size and speed of a model, and of a second one on request, measured alternately in this process.

    Args:
        model: as for `load`.
        against: the model to compare with, the dense one as a rule.
        batch_sizes: sequences at once.
        prompt: tokens that are read at once.
        new_tokens: tokens that are then generated one by one.
        repetitions: number of timed runs, after one to warm up; the median is reported.
        output: a file for the result as JSON; `speed.json` in a run folder is shown by the report of the run.

    Returns:
        By the name or path of each model.

    Raises:
        AdaPrunerError: an option or a model is invalid; before the weights are loaded.
    """
    if not batch_sizes or min(*batch_sizes, prompt, new_tokens, repetitions) < 1:
        raise AdaPrunerError("`batch_size`, `prompt`, `new_tokens` and `repetitions` must be at least 1")
    written = None if output is None else output_path(output)
    resolve_device(device)
    locations = {str(named): find_model(named) for named in (against, model) if named is not None}
    for location in locations.values():
        check_length(open_config(location), prompt + new_tokens)
    reporter, loaded = Reporter(), {}
    with reporter.stage("loading", len(locations)) as advance:
        for name, location in locations.items():
            loaded[name] = open_model(location, dtype, device)
            advance()
    with reporter.stage("measuring", len(loaded) * (len(batch_sizes) * (repetitions + 1) + 1)) as advance:
        speeds = measure_speed(loaded, batch_sizes, prompt, new_tokens, repetitions, advance)
    if written is not None:
        write_text(written, TypeAdapter(dict[str, Speed]).dump_json(speeds, indent=2).decode())
    return speeds

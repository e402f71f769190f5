"""The outcome of a run, `result.json`: the numbers of its models, their tables, and advice."""

import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from adapruner.base.progress import StageCost
from adapruner.base.tables import Cell, Cells, Column, Table
from adapruner.evaluation.abilities import Abilities, Estimate, Verdict, damaged, given_up, sentence
from adapruner.evaluation.losses import Perplexity
from adapruner.evaluation.speed import Speed
from adapruner.evaluation.tasks import TaskScore, mean_accuracies
from adapruner.options import PruneConfig
from adapruner.search.judging import Costs
from adapruner.search.study import SearchResult
from adapruner.text.sources import FUNCTIONS
from adapruner.tokens.model import VocabularySummary
from adapruner.train.healing import Healing

Kind = Literal["cost", "text", "ability", "task", "mean"]
# By metric.
_PROTOCOLS_OF_ABILITIES = {
    "agreement": "fraction of tokens at which the model predicts what the original does, in text of a kind that the"
    " original wrote",
    "loss": "nats per token of the original, in text of a kind that the original wrote",
    "left": "estimate of what is left of the abilities of the original, for code in HumanEval, with its range",
}


@dataclass(frozen=True)
class Number:
    """A measured number of a model.

    Attributes:
        kind: the size or speed of the model; on text; an ability; in a task; the mean over all tasks.
        metric: its name, `perplexity` or `acc`.
        dataset: the text or the task.
        digits: shown after the decimal point.
        error: standard error, if it is known.
        protocol: how it was measured, on one line.
        items: the number of items of the task.
        interval: the range of an estimate.
        by_item: the values of the windows of a text or of the items of a task, whose mean is the number, or the
            logarithm of a perplexity; of a mean over tasks, those of each task.
    """

    kind: Kind
    metric: str
    dataset: str
    value: float
    digits: int
    error: float | None = None
    protocol: str = ""
    items: int | None = None
    interval: tuple[float, float] | None = None
    by_item: Sequence[Sequence[float]] = ()

    @property
    def name(self) -> str:
        """The metric and the dataset."""
        is_on_text = self.kind in ("text", "ability")
        return f"{self.metric} on {self.dataset}" if is_on_text else f"{self.dataset}, {self.metric}"

    @property
    def cell(self) -> Cell:
        if self.interval:
            return Cell(f"{self.value:.0%}", f"{self.interval[0]:.0%}–{self.interval[1]:.0%}")
        return with_error(self.value, self.error, self.digits)


# Kind, metric and dataset.
Key = tuple[Kind, str, str]
Numbers = Mapping[Key, Number]


def numbers_of(
    perplexity: Mapping[str, Perplexity],
    abilities: Abilities | None = None,
    tasks: Mapping[str, TaskScore] | None = None,
    speed: Speed | None = None,
    left: Mapping[str, Estimate] | None = None,
) -> dict[Key, Number]:
    """The numbers of a model, and the means over its tasks.

    Args:
        perplexity: by text.
        tasks: by task.
        speed: of one sequence at a time.
        left: what is left of each ability.
    """
    numbers = list[Number]()
    if speed:
        protocol = "tokens per second of one sequence: a prompt, then new tokens with a cache; medians"
        numbers.append(Number("cost", "MB", "", speed.weight_bytes / 1e6, 1))
        numbers.append(Number("cost", "parameters", "", speed.parameters, 0))
        for metric, rates in (("prompt tokens/s", speed.prefill), ("new tokens/s", speed.decode)):
            numbers.append(Number("cost", metric, "", rates[1].median, 1, None, protocol))
    for text, measured in perplexity.items():
        protocol, losses, scale = measured.protocol, measured.losses, measured.bits_per_nat
        error = _standard_error([losses])
        of_perplexity = None if error is None else measured.perplexity * error
        shown = measured.perplexity, 2, of_perplexity, protocol
        numbers.append(Number("text", "perplexity", text, *shown, by_item=[losses]))
        if measured.bits_per_byte is not None and scale is not None:
            shown = measured.bits_per_byte, 4, None if error is None else error * scale, protocol
            numbers.append(Number("text", "bits per byte", text, *shown, by_item=[[scale * loss for loss in losses]]))
    numbers += [*(_abilities(abilities, left or {}) if abilities else ()), *(_scores(tasks) if tasks else ())]
    return {(number.kind, number.metric, number.dataset): number for number in numbers}


def _abilities(abilities: Abilities, left: Mapping[str, Estimate]) -> Iterator[Number]:
    def number(metric: str, dataset: str, value: float, digits: int, by_item: Sequence[float] = ()) -> Number:
        protocol = _PROTOCOLS_OF_ABILITIES[metric]
        return Number("ability", metric, dataset, value, digits, None, protocol, by_item=[by_item])

    for kind, reading in abilities.reads.items():
        if kind in left and not left[kind].at_chance:
            interval = left[kind].least, left[kind].most
            yield replace(number("left", kind, left[kind].left, 2), interval=interval)
        yield number("loss", kind, reading.loss, 3, reading.losses)
        if reading.agreement is not None:
            yield number("agreement", kind, reading.agreement, 2)


def _scores(tasks: Mapping[str, TaskScore]) -> Iterator[Number]:
    for task, score in tasks.items():
        for metric, value in score.metrics.items():
            error, right = score.standard_errors.get(metric), [*map(int, score.right.get(metric, ""))]
            yield Number("task", metric, task, value, 4, error, score.protocol, score.items, by_item=[right])
    # Tasks are independent of each other.
    for metric, value in mean_accuracies(score.metrics for score in tasks.values()).items():
        known = [metric if metric in score.metrics else "acc" for score in tasks.values()]
        errors = [score.standard_errors.get(name) for name, score in zip(known, tasks.values(), strict=True)]
        error = combined(*errors)
        items = [[*map(int, score.right.get(name, ""))] for name, score in zip(known, tasks.values(), strict=True)]
        error = None if error is None else error / len(errors)
        yield Number("mean", metric, "mean", value, 4, error, by_item=items)


def combined(*errors: float | None) -> float | None:
    """The standard error of a sum or a difference of independent numbers; None if one of their errors is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _standard_error(values: Sequence[Sequence[float]]) -> float | None:
    """That of the mean over the parts of the means of their values; None if a part has one, or one is not finite."""
    if not values or min(map(len, values)) < 2 or not all(math.isfinite(value) for part in values for value in part):
        return None
    return math.hypot(*(statistics.stdev(part) / math.sqrt(len(part)) for part in values)) / len(values)


def is_noise(difference: float, *errors: float | None) -> bool:
    """True if a difference of independent numbers is within two standard errors of zero; False if one is unknown."""
    error = combined(*errors)
    return error is not None and abs(difference) < 2 * error


def shortened(text: str, longest: int = 26) -> str:
    """The name of a text source, or its end if it is too long for a table."""
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def model_table(title: str, models: Mapping[str, Numbers]) -> Table:
    """Size, perplexity, bits per byte and speed of every model, a row each."""
    shown = _of_kind(models, "cost", "text")
    columns = [
        Column(f"{number.metric}\n{shortened(number.dataset)}" if number.dataset else number.metric)
        for number in shown.values()
    ]
    rows: list[Cells] = [[name, *(_cell(numbers, key) for key in shown)] for name, numbers in models.items()]
    return Table("model-table", title, [Column("model", is_number=False), *columns], rows, _protocols(shown))


def ability_table(models: Mapping[str, Numbers], verdicts: Mapping[str, str]) -> Table:
    """What models can still do, of those for which it is known, and their verdicts."""
    shown = _of_kind(models, "ability")
    compared = [{metric for _, metric, _ in numbers} for numbers in models.values()]
    if all("agreement" in metrics for metrics in compared if "loss" in metrics):
        shown = {key: number for key, number in shown.items() if number.metric != "loss"}
    known = {name: numbers for name, numbers in models.items() if shown.keys() & numbers.keys()}
    columns = [Column("ability", is_number=False), Column("measured", is_number=False), *map(Column, known)]
    rows: list[Cells] = [
        [number.dataset, number.metric, *(_cell(numbers, key) for numbers in known.values())]
        for key, number in shown.items()
    ]
    if verdicts:
        rows.append(["verdict", "", *(verdicts.get(name, "") for name in known)])
    captions = {number.metric: f"{number.metric.capitalize()}: {number.protocol}." for number in shown.values()}
    return Table("ability-table", "What it can still do", columns, rows, [" ".join(captions.values())] if rows else [])


def task_table(models: Mapping[str, Numbers]) -> Table:
    """Scores of the models that ran tasks, with the means over all tasks, and the change from the first model to the
    last."""
    shown = _of_kind(models, "task", "mean")
    scores = {name: numbers for name, numbers in models.items() if shown.keys() & numbers.keys()}
    columns = [Column("task", is_number=False), Column("metric", is_number=False), *map(Column, scores)]
    rows: list[Cells] = [
        [number.dataset, number.metric, *(_cell(numbers, key) for numbers in scores.values())]
        for key, number in shown.items()
    ]
    if len(scores) > 1:
        columns.append(Column("change", style="change"))
        first, *_, last = scores.values()
        changes = {key: difference(first[key], last[key]) for key in shown}
        rows = [[*cells, signed(*changes[key])] for cells, key in zip(rows, shown, strict=True)]
    return Table("task-table", "Scores in tasks", columns, rows, _protocols(shown))


def measured_table(models: Mapping[str, Numbers], *kinds: Kind) -> Table:
    """A row for every number, with its protocol; a column for every model."""
    shown = _of_kind(models, *kinds)
    columns = [Column("measured", is_number=False), *map(Column, models), Column("protocol", is_number=False)]
    rows: list[Cells] = [
        [number.name, *(_cell(numbers, key) for numbers in models.values()), number.protocol]
        for key, number in shown.items()
    ]
    return Table("measured", "", columns, rows)


def with_error(value: float, error: float | None, digits: int = 4) -> Cell:
    """A cell with a number and its standard error."""
    return Cell(f"{value:,.{digits}f}", "" if error is None else f"± {error:,.{digits}f}")


def signed(value: float, error: float | None, digits: int = 4) -> Cell:
    """A cell with a change and its standard error."""
    shown = "" if error is None else f"± {error:.{digits}f}"
    return Cell(f"{value:+.{digits}f}".replace("-", "−"), shown, is_noise=is_noise(value, error))


def difference(before: Number, after: Number) -> tuple[float, float | None]:
    """The growth of a number, of a perplexity that of its logarithm, and its standard error: of the differences window
    by window or item by item, if both models read the same."""
    growth = after.value - before.value
    errors = [before.error, after.error]
    if before.metric == "perplexity":
        growth = math.log(after.value / before.value)
        errors = [number.error and number.error / number.value for number in (before, after)]
    paired = None
    if [*map(len, before.by_item)] == [*map(len, after.by_item)]:
        parts = zip(before.by_item, after.by_item, strict=True)
        paired = _standard_error([[now - then for then, now in zip(*part, strict=True)] for part in parts])
    return growth, combined(*errors) if paired is None else paired


def _cell(numbers: Numbers, key: Key) -> Cell:
    return numbers[key].cell if key in numbers else Cell()


def _of_kind(models: Mapping[str, Numbers], *kinds: Kind) -> dict[Key, Number]:
    """A number of each metric and dataset with which a model was measured."""
    return {key: number for numbers in models.values() for key, number in numbers.items() if number.kind in kinds}


def _protocols(shown: Numbers) -> list[str]:
    return list(dict.fromkeys(number.protocol for number in shown.values() if number.protocol))


# Limits of advice: the growth of a perplexity, the number of windows, the share of parameters that tokens have.
_MUCH_WORSE, _FEW_WINDOWS, _MANY_TOKENS = 2.0, 256, 0.1

Role = Literal["dense", "pruned"]


class ModelNumbers(BaseModel, extra="forbid", frozen=True):
    """The numbers of one model of a run.

    Attributes:
        parameters: tied ones counted once.
        perplexity: by text.
        tasks: scores, by task.
        abilities: what it can do.
        left: what is left of each ability; empty for the dense model.
        verdict: on that; None for the dense model.
    """

    role: Role
    parameters: int
    perplexity: dict[str, Perplexity] = {}
    tasks: dict[str, TaskScore] = {}
    abilities: Abilities
    left: dict[str, Estimate] = {}
    verdict: Verdict | None = None

    @property
    def sentence(self) -> str:
        """The verdict with the ability that decided it; empty for the dense model."""
        return sentence(self.verdict, self.left)

    @property
    def numbers(self) -> Numbers:
        """All numbers, and the means over tasks."""
        size = Number("cost", "parameters", "", self.parameters, 0)
        return {
            ("cost", "parameters", ""): size,
            **numbers_of(self.perplexity, self.abilities, self.tasks, left=self.left),
        }


class RunResult(BaseModel, extra="forbid", frozen=True):
    """The content of `result.json`: every number, with the options and versions to reproduce it.

    Attributes:
        config: the options, with one ratio.
        plan_hash: of the final plan.
        share_of_decoder: the fraction of all parameters that is in the decoder, whose numbers these are.
        removed_bytes: of the weights in files.
        costs: of cutting each block; None if options decided how much each loses.
        search: the chosen candidate and all trials; None without a search.
        healing: the record of the training after the cut, if there was any.
        vocabulary: the tokens that were kept; None for all.
        embedding_share: the fraction of the parameters of the decoder that its tokens have.
        models: the dense and the pruned model.
        windows: the number of windows, by use and kind of text.
        stages: seconds and peak memory of every stage.
        versions: of the packages that decide numbers.
        device: of the last call that added numbers.
    """

    schema_version: Literal[13] = 13
    config: PruneConfig
    plan_hash: str
    share_of_decoder: float = 1.0
    removed_bytes: int = 0
    costs: Costs | None = None
    search: SearchResult | None = None
    healing: Healing | None = None
    vocabulary: VocabularySummary | None = None
    embedding_share: float = 0.0
    models: tuple[ModelNumbers, ...]
    windows: dict[str, dict[str, int]]
    stages: dict[str, StageCost]
    versions: dict[str, str] = Field(
        default_factory=lambda: {
            "python": platform.python_version(),
            **{name: version(name) for name in ("adapruner", "torch", "transformers", "optuna")},
        }
    )
    device: str = "cpu"

    def model(self, role: Role) -> ModelNumbers:
        """The numbers of one of the models."""
        return next(model for model in self.models if model.role == role)

    @property
    def final(self) -> ModelNumbers:
        """The model that the run is about."""
        return self.models[-1]

    @property
    def removed_share(self) -> float:
        """The fraction of all parameters that was removed."""
        return self.share_of_decoder * (1 - self.final.parameters / self.model("dense").parameters)


def advice_on(result: RunResult) -> list[str]:
    """Problems of the outcome and remedies, a line each."""
    if lines := [*_damage(result)]:
        lines.append("more tokens of `heal`, or a lower `ratio`, helps")
        if result.embedding_share > _MANY_TOKENS and not result.vocabulary:
            lines.append(
                f"the tokens have {result.embedding_share:.0%} of the parameters: `vocabulary_size` first removes those"
                " that code and English need least, or text like `vocabulary`"
            )
        judged = {kind: estimate.left for kind, estimate in result.final.left.items() if estimate.is_judged}
        if judged and min(judged, key=judged.__getitem__) == "code" and FUNCTIONS not in result.config.calibration:
            lines.append(
                f"code lost most: half {FUNCTIONS} as `calibration` (mix,{FUNCTIONS}:0.5) keeps nearly half of that"
            )
    lines += [f"{kind} {estimate}" for kind, estimate in result.final.left.items() if estimate.at_chance]
    if names := given_up(result.final.left):
        lines.append(f"{names}: given up with the tokens that were removed, not judged")
    count = sum(result.windows.get("compensation", {}).values())
    if 0 < count < _FEW_WINDOWS:
        remedy = "more calibration text, or more `compensation_windows`, makes a better model"
        lines.append(f"the remaining weights were fitted on {count} windows of text: {remedy}")
    return lines


def tables_of(title: str, models: Sequence[ModelNumbers]) -> list[Table]:
    """The tables of models, as far as they were measured; the title is that of the first table."""
    numbers: dict[str, Numbers] = {model.role: model.numbers for model in models}
    verdicts: dict[str, str] = {model.role: model.sentence for model in models if model.verdict}
    tables = (model_table(title, numbers), ability_table(numbers, verdicts), task_table(numbers))
    return [table for table in tables if table.rows]


def summary_of(title: str, models: Sequence[ModelNumbers]) -> Table:
    """What models come to, a row for each size, text and mean, for the two abilities that lost most, and for the
    verdict; the tables have everything."""
    numbers: dict[str, Numbers] = {model.role: model.numbers for model in models}
    shown = _of_kind(numbers, "cost", "text", "mean")
    estimated = [number for number in models[-1].numbers.values() if number.metric == "left"]
    least = sorted(estimated, key=lambda number: number.value)[:2]
    keys = [key for key in shown if key[1] != "bits per byte"]
    rows: list[Cells] = [
        [shown[key].name if key[2] else key[1], *(_cell(own, key) for own in numbers.values())] for key in keys
    ]
    rows += [[f"estimated to be left of {number.dataset}", *[""] * (len(models) - 1), number.cell] for number in least]
    agreements = [[one.value for key, one in own.items() if key[1] == "agreement"] for own in numbers.values()]
    if all(agreements):
        rows.append(["tokens predicted as by the original", *(f"{statistics.fmean(own):.0%}" for own in agreements)])
    rows.append(["verdict", *(model.sentence for model in models)])
    return Table("summary", title, [Column("", is_number=False), *map(Column, numbers)], rows)


def _damage(result: RunResult) -> Iterator[str]:
    """A line for every text on which the final model is much worse than the dense one, on the verdict if it is not
    usable, and for every other sign that it is broken."""
    dense, final = result.model("dense"), result.final
    for text, measured in final.perplexity.items():
        before, after = dense.perplexity[text].perplexity, measured.perplexity
        if not after <= _MUCH_WORSE * before:
            yield f"perplexity on {text} rose from {before:.1f} to {after:.1f}"
    if final.verdict in ("broken", "recover first"):
        yield "the model is broken" if final.verdict == "broken" else "the model should be trained further before use"
    if lost := damaged(final.left):
        yield f"what it lost most: {'; '.join(lost)}"


def shown_name(model: str) -> str:
    """The name of a model; of a local one, without the folders above it."""
    return Path(model).name if Path(model).is_absolute() else model

"""The outcome of a run: `result.json`, the numbers of its models, and advice."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from adapruner.base.progress import StageCost
from adapruner.base.tables import Table
from adapruner.budget.plan import PruningPlan
from adapruner.evaluation.abilities import Abilities, Verdict, damaged, judge
from adapruner.evaluation.perplexity import Perplexity
from adapruner.evaluation.tasks import TaskScore, mean_accuracies
from adapruner.option_rules import fields_of, tries_fixed_metrics
from adapruner.options import PruneConfig
from adapruner.report.numbers import Number, Numbers, ability_table, model_table, numbers_of, task_table
from adapruner.search.judging import Costs
from adapruner.search.result import SearchResult
from adapruner.train.healing import Healing

# Limits of advice: the growth of a perplexity, the number of windows, the multiple that widths should have.
_MUCH_WORSE, _FEW_WINDOWS, _FRIENDLY_MULTIPLE = 2.0, 256, 8

Role = Literal["dense", "best_fixed", "searched"]
# For options by name, true if a run with them evaluates the model. That of a step on the way takes as long as the final
# one, and shows what the search gained.
IS_WANTED: dict[Role, Callable[..., bool]] = {
    "dense": lambda: True,
    "best_fixed": tries_fixed_metrics,
    "searched": lambda: True,
}


class ModelNumbers(BaseModel, extra="forbid", frozen=True):
    """The numbers of one model of a run.

    Attributes:
        role: `dense`; `best_fixed`, pruned by the best of LLM-Pruner's metrics, neither compensated nor healed, only
            where they were tried; `searched`, the pruned model.
        parameters: tied ones counted once.
        perplexity: by text.
        tasks: scores, by task.
        abilities: what it can do; None for `best_fixed`.
        verdict: on its abilities; None for the dense model and `best_fixed`.
    """

    role: Role
    parameters: int
    perplexity: dict[str, Perplexity] = {}
    tasks: dict[str, TaskScore] = {}
    abilities: Abilities | None = None
    verdict: Verdict | None = None

    @property
    def mean_accuracies(self) -> dict[str, float]:
        """The means over all tasks, by metric."""
        return mean_accuracies(score.metrics for score in self.tasks.values())

    @property
    def numbers(self) -> Numbers:
        """All numbers, and the means over tasks."""
        size = Number("cost", "parameters", "", self.parameters, 0)
        return {("cost", "parameters", ""): size, **numbers_of(self.perplexity, self.abilities, self.tasks)}


class RunResult(BaseModel, extra="forbid", frozen=True):
    """The content of `result.json`: every number, with the options and versions to reproduce it.

    Attributes:
        config: the options, with one ratio.
        plan_hash: of the final plan.
        costs: of cutting each block; None if options decided how much each loses.
        search: the chosen candidate and all trials; None without a search.
        healing: the record of the training after the cut, if there was any.
        models: the models, in the order in which they were made.
        windows: the number of windows, by use and kind of text.
        stages: seconds and peak memory of every stage.
        versions: of the packages that decide numbers.
        device: of the last call that added numbers.
    """

    schema_version: Literal[9] = 9
    config: PruneConfig
    plan_hash: str
    costs: Costs | None = None
    search: SearchResult | None = None
    healing: Healing | None = None
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
        return 1 - self.model("searched").parameters / self.model("dense").parameters


def advice_on(result: RunResult, plan: PruningPlan) -> list[str]:
    """Problems of the outcome and remedies, a line each."""
    if lines := [*_damage(result)]:
        lines.append("more tokens of `heal`, or a lower `ratio`, helps")
    count = sum(result.windows.get("compensation", {}).values())
    if 0 < count < _FEW_WINDOWS:
        lines.append(
            f"the remaining weights were fitted on {count} windows of text: more calibration text, or more"
            " `compensation_windows`, makes a better model"
        )
    odd = [block for block in plan.blocks if block.kind == "channels" and len(block.kept) % _FRIENDLY_MULTIPLE]
    if odd:
        lines.append(
            f"the feed-forward widths of {len(odd)} layers are not multiples of {_FRIENDLY_MULTIPLE}, with which"
            " most devices are faster: `round_to` 32 keeps to those"
        )
    return lines


def tables_of(title: str, models: Sequence[ModelNumbers], names: Mapping[Role, str]) -> list[Table]:
    """The tables of models, as far as they were measured.

    Args:
        title: of the first table.
        names: of the models, by role.
    """
    numbers = {names[model.role]: model.numbers for model in models}
    verdicts = {names[model.role]: model.verdict for model in models if model.verdict}
    tables = (model_table(title, numbers), ability_table(numbers, verdicts), task_table(numbers))
    return [table for table in tables if table.rows]


def verdict_of(role: Role, abilities: Mapping[Role, Abilities | None]) -> Verdict | None:
    """The verdict on a model, from the abilities of all models; None for the dense model, and if they are not known."""
    dense, pruned = abilities.get("dense"), abilities.get(role)
    return judge(dense, pruned) if dense and pruned and role != "dense" else None


def _damage(result: RunResult) -> Iterator[str]:
    """A line for every text on which the final model is much worse than the dense one, on the verdict if it is not
    usable, and for every other sign that it is broken."""
    dense, final = result.model("dense"), result.final
    for text, measured in final.perplexity.items():
        before, after = dense.perplexity[text].perplexity, measured.perplexity
        if not after <= _MUCH_WORSE * before:
            yield f"perplexity on {text} rose from {before:.1f} to {after:.1f}"
    if dense.abilities is None or final.abilities is None:
        return
    if final.verdict == "broken":
        yield "the model is broken"
    elif final.verdict == "recover first":
        yield "the model should be trained further before use"
    if lost := damaged(dense.abilities, final.abilities):
        yield f"what it lost most: {', '.join(lost)}"


def roles_of(config: PruneConfig) -> list[Role]:
    """The models that a run with this config may have."""
    return [
        role for role, test in IS_WANTED.items() if test(**{name: getattr(config, name) for name in fields_of(test)})
    ]


def titles(result: RunResult) -> dict[Role, str]:
    """The names of the models of a run, by role."""
    fixed = result.search.best_fixed_name if result.search else ""
    how = "" if result.config.compensation == "none" else ", not compensated"
    return {"dense": "dense", "best_fixed": f"best fixed metric ({fixed}){how}", "searched": "pruned"}


def shown_name(model: str) -> str:
    """The name of a model; of a local one, without the folders above it."""
    return Path(model).name if Path(model).is_absolute() else model

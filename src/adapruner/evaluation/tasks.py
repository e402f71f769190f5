"""Zero-shot and other tasks of lm-eval, with local data if available."""

import contextlib
import difflib
import io
import logging
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from pydantic import BaseModel, computed_field
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError, reason
from adapruner.base.files import find_local_data, parse_yaml
from adapruner.base.processes import random_state_kept

COMMONSENSE, GENERATIVE = "commonsense", "generative"
# Tasks that judge the content of text that the model writes. HumanEval and MBPP run code that the model writes.
_GENERATIVE_TASKS = ("gsm8k", "ifeval")
_SPLITS = ("training_split", "validation_split", "test_split")
# Attributes of tasks that cannot be run.
_IMPOSSIBLE = {
    "MULTIMODAL": "asks about images or audio, which a language model does not read",
    "UNSAFE_CODE": "runs code that the model writes, which is not done here: run lm-eval directly",
}
# Sequences at a time on the CPU; on a GPU, lm-eval finds out what fits.
_BATCH_ON_CPU = 8


class TaskScore(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """The score of a model in a task of lm-eval, and how it was measured.

    Attributes:
        task: the name in lm-eval.
        metrics: by the name in lm-eval, with the name of its filter in brackets if it has one: `acc` is the share of
            items whose right answer is the most likely one, `acc_norm` the same with log-likelihoods divided by the
            length of the answer in bytes.
        standard_errors: of the same metrics, if lm-eval gives one.
        right: of the metrics that are 1 or 0 for every item, a digit for each, by which two models are compared item by
            item.
        items: the number of items, out of `items_in_all`; if fewer, they are evenly spaced.
        data_set, split: the dataset of the items and its split.
        version: of the task in lm-eval.
        shots: examples in the prompt.
        dtype: the dtype of the model.
    """

    task: str
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    right: dict[str, str] = {}
    items: int
    items_in_all: int
    data_set: str
    split: str
    version: str
    shots: int
    dtype: str

    @computed_field
    @property
    def protocol(self) -> str:
        """How the numbers were measured, on one line."""
        which = "all" if self.items == self.items_in_all else f"{self.items:,} of"
        return (
            f"{self.task}: lm-eval task version {self.version}, {self.shots} shots, {which} {self.items_in_all:,} items"
            f" of {self.data_set}, {self.split}; {self.dtype}"
        )


def mean_accuracies(metrics: Iterable[dict[str, float]]) -> dict[str, float]:
    """The means over tasks of `acc`, and of `acc_norm` or else `acc`; empty if a task has no accuracy.

    Args:
        metrics: of each task, see `TaskScore`.
    """
    scores = list(metrics)
    if not scores or not all("acc" in score for score in scores):
        return {}
    return {name: fmean(score.get(name, score["acc"]) for score in scores) for name in ("acc", "acc_norm")}


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to run, with their data.

    Attributes:
        by_name: the task or group that lm-eval built for each name, or several of them for a tag.
        items: the numbers of the items to run, by task.
    """

    by_name: dict[str, list[Any]]
    items: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.by_name)


def check_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that names stand for. Reads no data, and reads lm-eval's register of tasks, which takes seconds, only
    for tasks outside `commonsense` and `generative`.

    Args:
        names: tasks, groups or tags of lm-eval, one by one or separated by commas; `commonsense` is the seven tasks of
            the paper, `generative` is GSM8K and IFEval.
    """
    if find_spec("lm_eval") is None:
        raise AdaPrunerError("`tasks` needs lm-eval: pip install '.[tasks]' in a checkout")
    single = [name.strip() for listed in names for name in listed.split(",") if name.strip()]
    if not single:
        raise AdaPrunerError("`tasks` names no task: give names of lm-eval, commonsense or generative")
    groups = {COMMONSENSE: (*_local_tasks(),), GENERATIVE: _GENERATIVE_TASKS}
    wanted = dict.fromkeys(task for name in single for task in groups.get(name, (name,)))
    grouped = {task for tasks in groups.values() for task in tasks}
    for name in wanted:
        if name not in grouped and name not in (known := _task_manager().all_tasks):
            close = difflib.get_close_matches(name, [*groups, *known], n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise AdaPrunerError(f"lm-eval has no task {name!r}{hint} (`lm-eval ls tasks` lists them)")
    return list(wanted)


def load_tasks(names: Sequence[str], limit: int | None = None, used_text: Iterable[str] = ()) -> Tasks:
    """Finds tasks and reads their data.

    Prompts and metrics are those of lm-eval. The data of the seven tasks of the paper are read from `$ADAPRUNER_DATA`
    if available (see `tasks.yaml`).

    Args:
        names: see `check_tasks`.
        limit: the number of evenly spaced items of each task; by default all.
        used_text: items with one of these texts in a field are left out: a model was calibrated on them.
    """
    used = frozenset(used_text)
    built, items = {}, {}
    for name in check_tasks(names):
        try:
            with _contained():
                loaded = _load(name)
        except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
            raise AdaPrunerError(f"cannot load task {name!r} or its data: {reason(error)}") from error
        # Groups, and tasks that are in no group.
        inside = {member for members in loaded.get("group_map", {}).values() for member in members}
        everything = {**loaded.get("groups", {}), **loaded["tasks"]}
        built[name] = [task for of_name, task in everything.items() if of_name not in inside]
        for task_name, task in loaded["tasks"].items():
            for sign, why in _IMPOSSIBLE.items():
                if getattr(task, sign, False):
                    raise AdaPrunerError(f"task {task_name!r} {why}")
            unused = []
            for number, item in enumerate(task.eval_docs):
                texts = [text for text in item.values() if isinstance(text, str)]
                if used.isdisjoint([*texts, *(text.partition(" -- ")[2] for text in texts)]):  # or after a title
                    unused.append(number)
            count = min(limit or len(unused), len(unused))
            items[task_name] = [unused[step * len(unused) // count] for step in range(count)]
            if not unused:
                raise AdaPrunerError(f"every item of task {task_name!r} holds text that the model is calibrated on")
    return Tasks(built, items)


def measure_tasks(
    model: PreTrainedModel, tokenizer: Tokenizer, tasks: Tasks, progress: Callable[..., None] | None = None
) -> list[TaskScore]:
    """Runs tasks through lm-eval.

    Args:
        progress: called with fractions of a task as they are done, which sum to one for each name.
    """
    scores = []
    with _contained():
        from lm_eval.models.huggingface import HFLM

        batch_size = _BATCH_ON_CPU if model.device.type == "cpu" else "auto"
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for built in tasks.by_name.values():
            outcome = _evaluate(runner, built, tasks.items, progress)
            for name in [task.name if hasattr(task, "child_names") else task.task_name for task in built]:
                score = _score(name, outcome, tasks, model)
                members = [] if score.metrics else _members(name, outcome)
                scores += [_score(member, outcome, tasks, model) for member in members] or [score]
    return scores


def _evaluate(runner: Any, built: list[Any], items: dict[str, list[int]], progress: Callable[..., None] | None) -> Any:
    """The same as `simple_evaluate` of lm-eval, without its report on the environment, which asks pip and git."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    # The tasks are built already, so none is looked up.
    loaded = TaskManager(include_defaults=False).load(built)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)

    @cache
    def share_of_an_answer() -> float:
        """The fraction of all answers; known once lm-eval has built its requests."""
        return 1 / sum(int(request.repeats) for task in loaded["tasks"].values() for request in task.instances)

    if progress:  # the cache of lm-eval is told of every answer
        runner.set_cache_hook(SimpleNamespace(add_partial=lambda *_: progress(share_of_an_answer())))
    return evaluate(runner, loaded, samples=items, log_samples=True, fewshot_as_multiturn=True)


def _score(name: str, outcome: dict[str, Any], tasks: Tasks, model: PreTrainedModel) -> TaskScore:
    """The score of a task, or of a group that lm-eval reduces to one number."""
    metrics: dict[str, float] = {}
    standard_errors: dict[str, float] = {}
    right: dict[str, str] = {}
    members = _members(name, outcome)
    samples = [sample for member in members for sample in sorted(outcome["samples"][member], key=itemgetter("doc_id"))]
    for key, value in outcome["results"][name].items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float):
            values = standard_errors if metric.endswith("_stderr") else metrics
            title = metric.removesuffix("_stderr") + (f" ({kind})" if kind != "none" else "")
            values[title] = float(value)
            of_items = [sample.get(metric) for sample in samples if sample["filter"] == kind]
            if of_items and all(one in (0, 1) for one in of_items):
                right[title] = "".join(str(int(one)) for one in of_items)
    configs = [outcome["configs"][member] for member in members]
    return TaskScore(
        task=name,
        metrics=metrics,
        standard_errors=standard_errors,
        right=right,
        items=sum(len(tasks.items[task]) for task in members),
        items_in_all=sum(outcome["n-samples"][task]["original"] for task in members),
        data_set=", ".join(dict.fromkeys(map(_data_set, configs))),
        split=str(configs[0].get("test_split") or configs[0].get("validation_split")),
        version=str(outcome["versions"].get(name)),
        shots=int(outcome["n-shot"][members[0]]),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _members(name: str, outcome: dict[str, Any]) -> list[str]:
    """The tasks of a group, and of the groups in it; of a task, itself."""
    inside = outcome["group_subtasks"].get(name)
    return [task for member in inside for task in _members(member, outcome)] if inside else [name]


@cache
def _local_tasks() -> dict[str, dict[str, Any]]:
    """The content of tasks.yaml, where its fields are explained."""
    text = (resources.files("adapruner.evaluation") / "tasks.yaml").read_text(encoding="utf-8")
    tasks: dict[str, dict[str, object]] = parse_yaml(text)
    return tasks


@cache
def _task_manager() -> Any:
    """lm-eval's register of tasks; building it reads thousands of files."""
    with _contained():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _load(name: str) -> Any:
    """Builds a task, with the data under `$ADAPRUNER_DATA` if available."""
    from lm_eval import tasks

    known = _local_tasks().get(name)
    if known is None:
        return _task_manager().load(name)
    folder = Path(tasks.__file__).parent / known["definition"]
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    local = ((path, split) for data, split in known["local"].items() if (path := find_local_data(data)))
    path, local_split = next(local, (None, None))
    if path is None:
        return manager.load(name)
    definition = {
        "include": str(manager.task_index[name].yaml_path),
        "dataset_path": "arrow" if path.is_dir() else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {local_split: str(path / "data-*.arrow" if path.is_dir() else path)}},
        **{split: local_split if split == f"{local_split}_split" else None for split in _SPLITS},
        **known.get("fields", {}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(definition), encoding="utf-8")
        return manager.load(str(file))


def _data_set(config: dict[str, Any]) -> str:
    """The name of the dataset of a task on the Hub, or the path of a local copy below `$ADAPRUNER_DATA`."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict) and config["task"] in _local_tasks():
        file = str(next(iter(files.values())))
        return next((data for data in _local_tasks()[config["task"]]["local"] if data in file), file)
    return " ".join(str(config[name]) for name in ("dataset_path", "dataset_name") if config.get(name))


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Hides the bars and logs of lm-eval and of the libraries that it calls, and keeps the random state."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), random_state_kept():
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()

"""Options and outcome of the runs that tests share."""

import hashlib
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from multiprocessing import current_process, get_context
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import adapruner
from adapruner.base.progress import Advance, Reporter
from adapruner.cli import main
from adapruner.evaluation import abilities as _abilities

# Files that say how long something took, or show it.
WITH_TIMES = ("result.json", "report.html", "recovery.json", "healing.json", "study.jsonl", "config.yaml")
# Of a run that takes little time.
RUN_OPTIONS: dict[str, Any] = {
    "ratio": 0.1,
    "pool": 12,
    "samples": 4,
    "objective_windows": 6,
    "seq_len": 16,
    "trials": 9,
    "protect_first": 1,
    "protect_last": 1,
    "round_to": 1,
    # Training is tested for itself.
    "heal": "none",
}

# Less of everything that no test of a whole run is about.
QUICK: dict[str, Any] = RUN_OPTIONS | {"trials": 5, "compensation_windows": 32}

# Fewer abilities to measure: target, name and value.
_BUILT_IN = {name: items[:6] for name, items in _abilities.built_in_tasks().items()}
FEW_ABILITIES = (
    (_abilities, "built_in_tasks", lambda: _BUILT_IN),
    (_abilities, "_ANSWER_WINDOWS", 1),
    (_abilities, "_WINDOWS_OF_CODE", 2),
    (_abilities, "_ANSWER_TOKENS", 16),
    (_abilities, "_SHOWN_TOKENS", 8),
)

# Imported once, by the server that starts the processes of tests; what is not installed is left out.
_PRELOADED = [
    "adapruner.cli.models",
    "adapruner.cli.runs",
    "adapruner.run.prune",
    "adapruner.run.evaluate",
    "adapruner.run.recover",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "optuna.samplers._tpe.sampler",
    "peft",
    "pytest",
    "read_once",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]


def flags(options: Mapping[str, object], prefix: str = "") -> list[str]:
    """The options as arguments of the command line."""
    arguments: list[str] = []
    for name, value in options.items():
        option = f"{prefix}{name.strip('_').replace('_', '-')}"
        arguments += [f"--no-{option}"] if value is False else [f"--{option}", *([] if value is True else [str(value)])]
    return arguments


def prune_command(
    model: Path, output: Path, text: Path, options: Mapping[str, object] = RUN_OPTIONS, **changes: object
) -> list[str]:
    """The arguments of `adapruner prune` with the options of a run, and changes to them."""
    return ["prune", str(model), "-o", str(output), *flags({**options, "calibration": str(text), **changes})]


def exit_code(arguments: list[str]) -> int:
    """Runs the command line in this process."""
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def written(run: Path) -> dict[str, int]:
    """When each file of a run folder was written, by its path in it."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.name not in ("log.jsonl", ".lock"))
    return {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in paths}


def stages_done(run: Path) -> list[str]:
    """The stages that were finished in a run folder, in the order in which they were."""
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [entry["stage"] for entry in entries if entry["event"] == "finished"]


def interrupt_before(stage: str, model: Path, output: Path, **options: Any) -> None:
    """Prunes until a stage begins."""
    begin = Reporter.stage

    def begin_or_stop(reporter: Reporter, name: str, total: int | None = 1) -> AbstractContextManager[Advance]:
        if name == stage:
            raise KeyboardInterrupt
        return begin(reporter, name, total)

    with patch.object(Reporter, "stage", begin_or_stop), pytest.raises(KeyboardInterrupt):
        adapruner.prune(str(model), output=output, **options)


def fast_starts() -> BaseContext:
    """A way to start real processes in milliseconds: they are forked from one that has imported everything.

    They do not see what this process has changed in modules since its first start, such as monkeypatches.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server finds modules of the tests by this alone; it runs until the tests end.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path])):
        ensure_running()
    return context


def start_main(
    before: Callable[..., None], settings: tuple[Any, ...], arguments: list[str], folder: Path, **environment: str
) -> BaseProcess:
    """Starts the command line in a process of `fast_starts`.

    Args:
        before: a function of a module, called with `settings` in the process before the command is run.
        folder: for what the process prints, see `said_by`.
        environment: variables that it has beside those of this process.
    """
    # Sums depend on the number of threads in their last digits.
    others = (arguments, folder, os.environ | environment, torch.get_num_threads())
    process = fast_starts().Process(target=_run_main, args=(before, settings, *others))
    process.start()
    return process


def said_by(process: BaseProcess, folder: Path) -> str:
    return (folder / f"{process.name}.txt").read_text()


def _run_main(
    before: Callable[..., None],
    settings: tuple[Any, ...],
    arguments: list[str],
    folder: Path,
    environment: Mapping[str, str],
    threads: int,
) -> None:
    file = os.open(folder / f"{current_process().name}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    for setting in FEW_ABILITIES:
        setattr(*setting)
    before(*settings)
    main(arguments)


def _kill_when_called(target: str, name: str, calls: int) -> None:
    holder = pkgutil.resolve_name(target)
    original, left = getattr(holder, name), calls

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(holder, name, counted)


def _kill_before_writing(pattern: str) -> None:
    replace = os.replace

    def stop_before(source: Path, target: Path) -> None:
        if fnmatch(str(target), pattern):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = stop_before


def run_killed_before_writing(pattern: str, arguments: list[str], folder: Path, **environment: str) -> None:
    """Runs the command line in a process that is killed when it puts something finished in a place.

    Args:
        pattern: of the path.
        folder: for what it prints.
        environment: variables that it has beside those of this process.
    """
    process = start_main(_kill_before_writing, (pattern,), arguments, folder, **environment)
    process.join()
    assert process.exitcode == -signal.SIGKILL, said_by(process, folder)


def run_killed(target: str, name: str, calls: int, arguments: list[str], folder: Path, **environment: str) -> None:
    """Runs the command line in a process that is killed when it calls a function again, after so many calls.

    Args:
        target: the module or class that the function is in.
        folder: for what it prints.
        environment: variables that it has beside those of this process.
    """
    process = start_main(_kill_when_called, (target, name, calls), arguments, folder, **environment)
    process.join()
    assert process.exitcode == -signal.SIGKILL, said_by(process, folder)


def assert_same_artifacts(run: Path, undisturbed: Path) -> None:
    """Two finished runs made the same artifacts from the same inputs, byte by byte but for the times in them."""
    contents = [_contents(folder) for folder in (run, undisturbed)]
    assert contents[0].keys() == contents[1].keys()
    assert [path for path, content in contents[0].items() if content != contents[1][path]] == []
    results = [json.loads((folder / "result.json").read_text()) | {"stages": None} for folder in (run, undisturbed)]
    for result in results:
        if result["healing"]:
            del result["healing"]["record"]["seconds"]
    assert results[0] == results[1]


def _contents(run: Path) -> dict[str, object]:
    """What tells the files of a finished run apart, records included."""
    contents: dict[str, object] = {}
    for name in written(run):
        path = run / name
        if path.parent.name == "keys":
            record = json.loads(path.read_bytes())
            assert record["files"], name
            record["files"] = {file: stamp for file, stamp in record["files"].items() if not file.endswith(WITH_TIMES)}
            contents[name] = record
        elif not name.endswith(WITH_TIMES):
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


RIVER = ("the river runs through the old town, past the mill and the market",) * 9


def byte_tokenizer(texts: Iterable[str] = RIVER, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most so many tokens, which can be written as GGUF."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[*special.values()])
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def config_with_experts(folder: Path, experts: int) -> dict[str, Any]:
    """The fields of the config of a folder, for so many experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    fields = json.loads((folder / "config.json").read_text())
    assert any(name in fields for name in names)
    return {name: experts if name in names else value for name, value in fields.items()}

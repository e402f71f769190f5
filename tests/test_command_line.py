"""What the command line shows and offers beside the results of its verbs."""

import contextlib
import io
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import adapruner
from adapruner.base.progress import Reporter
from adapruner.cli import main
from adapruner.cli.runs import _default_output
from adapruner.cli.shared import OPTION_GROUPS
from adapruner.options import PruneOptions, SizeLimit
from adapruner.recipes import read_recipe, recipes

RUN = ["--ratio", "0.2", "--pool", "4", "--samples", "2", "--objective-windows", "4"]
RUN += ["--compensation-windows", "8", "--seq-len", "16", "--trials", "3", "--round-to", "1", "--no-remove-attention"]
RUN += ["--heal", "none"]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(arguments)


def in_a_shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adapruner", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def test_every_option_of_a_run_is_in_one_group():
    options = [*PruneOptions.model_fields, *SizeLimit.model_fields]
    assert Counter(name for names in OPTION_GROUPS.values() for name in names) == Counter(options)


def test_help_begins_with_what_most_runs_set_and_fits_a_narrow_terminal():
    shown = in_a_shell("prune", "--help-all", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    places = [shown.index(f"─ {name} ─") for name in (*OPTION_GROUPS, "Run folder")]
    assert places == sorted(places)
    assert places[0] < shown.index("--ratio", places[0]) < shown.index("--size", places[0]) < places[1]
    assert {"--" + name.strip("_").replace("_", "-") for name in PruneOptions.model_fields} <= options_in(shown)


@pytest.mark.parametrize("verb", ["prune", "recover", "inspect", "evaluate"])
def test_help_lists_at_most_fifteen_options(verb):
    shown, everything = (options_in(in_a_shell(verb, flag, COLUMNS="80").stdout) for flag in ("--help", "--help-all"))
    assert len(shown) <= 15
    assert shown <= everything


def options_in(text: str) -> set[str]:
    """The options that begin a line of a help."""
    return set(re.findall("^│ (--[a-z-]+)", text, re.MULTILINE))


def test_verbs_stand_in_the_order_of_use():
    shown = in_a_shell("--help", COLUMNS="80").stdout
    verbs = re.findall("^│ ([a-z]+) ", shown, re.MULTILINE)
    used = ["inspect", "prune", "report", "recover", "evaluate", "benchmark", "export"]
    assert verbs == [*used, "vocabulary", "recipes", "env"]


def test_no_colour_where_none_is_wanted():
    """Of a result on stdout and of an error on stderr; bold and italics are no colours (https://no-color.org)."""
    colour = re.compile(r"\x1b\[(?:\d+;)*[349][0-7]m")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    for arguments in (("--help",), ("prune", "--trials", "0")):
        coloured, plain = (in_a_shell(*arguments, **terminal, **extra) for extra in ({}, {"NO_COLOR": "1"}))
        assert colour.search(coloured.stdout + coloured.stderr)
        assert not colour.search(plain.stdout + plain.stderr)


def test_a_dry_run_says_what_the_run_then_makes(model_folder, text_file, tmp_path, monkeypatch, capsys):
    """Into the folder that is the default, which is named after the model and the ratio."""
    monkeypatch.chdir(tmp_path)
    command = ["--quiet", "prune", str(model_folder), "--calibration", str(text_file), *RUN, "--json"]
    run(*command, "--dry-run")
    assert not list(tmp_path.iterdir())
    foreseen = json.loads(capsys.readouterr().out)
    run(*command)
    result = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs" / "tiny-0.2"
    made = {json.loads(file.read_text())["name"] for file in (folder / "keys").iterdir()}
    assert set(foreseen["missing"]) == made
    dense, pruned = (
        next(model["parameters"] for model in result["models"] if model["role"] == role) for role in ("dense", "pruned")
    )
    assert foreseen["parameters_before"] == dense
    assert abs(foreseen["parameters_after"] - pruned) <= 0.01 * dense
    moments = sum(file.stat().st_size for file in (folder / "moments").rglob("*.safetensors"))
    assert foreseen["moments_bytes"] <= moments <= 1.2 * foreseen["moments_bytes"] + 2**16
    run(*command, "--dry-run")
    assert json.loads(capsys.readouterr().out)["missing"] == []


@pytest.mark.parametrize(
    ("model", "recipe", "options", "folder"),
    [
        ("HuggingFaceTB/SmolLM2-360M", None, {}, "runs/SmolLM2-360M-0.2"),
        ("models/small.gguf", None, {"ratio": 0.25}, "runs/small-0.25"),
        (".", None, {"ratio": 0.3}, "runs/here-0.3"),
        ("huggyllama/llama-7b", "paper-50", {}, "runs/llama-7b-0.6"),
        (None, "mine.yaml", {}, "runs/of-mine-0.4"),
        ("other", "mine.yaml", {"ratio": 0.5}, "runs/other-0.5"),
        (None, "mine.yaml", {"size": "400MB"}, "runs/of-mine-400MB"),
        ("smollm2", None, {"memory": "1GiB", "batch": 4}, "runs/smollm2-1GiB"),
    ],
)
def test_the_default_run_folder(model, recipe, options, folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("mine.yaml").write_text("model: me/of-mine\nratio: 0.4\n")
    assert _default_output(model, recipe, options) == Path(folder)


def test_a_dry_run_is_refused_for_what_the_run_would_be(model_folder, text_file, tmp_path, capsys):
    command = ["prune", str(model_folder), "-o", str(tmp_path / "run"), "--calibration", str(text_file), *RUN]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--evaluate", "no-such-file.txt", "--dry-run"])
    [message] = capsys.readouterr().err.splitlines()
    assert "no-such-file.txt" in message
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_printed_and_read_again(tmp_path, capsys):
    run("recipes", "--json")
    assert json.loads(capsys.readouterr().out).keys() == recipes().keys()
    for name in recipes():
        run("recipes", name)
        (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
        assert (tmp_path / "mine.yaml").read_text() == recipes()[name]
        run("recipes", name, "--json")
        options = json.loads(capsys.readouterr().out)
        assert options == read_recipe(tmp_path / "mine.yaml") == read_recipe(name)
    with pytest.raises(SystemExit, match="2"):
        main(["recipes", "no-such"])
    assert "the package has gemma3-4b, " in capsys.readouterr().err


def test_env_names_what_users_install_and_no_tool_of_developers(capsys):
    def shown(*arguments: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["env", *arguments])
        return capsys.readouterr().out

    content = json.loads(shown("--json"))
    assert content["adapruner"] == adapruner.__version__
    assert content["packages"]["torch"] == version("torch")
    assert {"transformers", "lm-eval", "cyllama"} <= content["packages"].keys()
    assert not {"pytest", "ruff", "adapruner"} & content["packages"].keys()
    assert content["devices"][0].startswith("cpu, ")
    table = shown()
    assert content["devices"][0] in table
    assert version("transformers") in table


def test_the_level_of_the_logger_decides_what_is_shown(capsys, monkeypatch):
    def inspect(_: str) -> None:
        with Reporter().stage("looking"):
            logging.getLogger("adapruner").debug("a detail")
        raise adapruner.AdaPrunerError("nothing there")

    monkeypatch.setattr("adapruner.run.steps.inspect", inspect)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    shown = {}
    for flags in ((), ("--quiet",), ("-v",)):
        with pytest.raises(SystemExit, match="2"):
            main([*flags, "inspect", "x"])
        shown[flags] = capsys.readouterr().err
    assert "looking: done in" in shown[()]
    assert "a detail" not in shown[()]
    assert shown[("--quiet",)] == "adapruner: nothing there\n"
    assert "looking: done in" in shown[("-v",)]
    assert "adapruner: a detail" in shown[("-v",)]
    assert '"event": "finished", "stage": "looking"' in shown[("-v",)]


def test_lines_say_what_is_evaluated(capsys):
    reporter = Reporter()
    with reporter.making("key", "perplexity-dense"), reporter.stage("evaluating"):
        pass
    with reporter.stage("saving"):
        pass
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "evaluating (perplexity-dense)",
        "saving",
    ]


def test_a_stage_prints_a_line_a_minute_without_a_terminal(capsys, monkeypatch):
    """In whole steps, also within one, and with the remaining time by the pace since the first; a stage of less than a
    minute has the line at its end alone."""
    seconds, is_waiting, is_over = [0.0], queue.Queue[bool](), queue.Queue[bool]()

    class Minutes:
        def wait(self, timeout: float) -> bool:
            is_waiting.put(True)
            is_ended = is_over.get()
            seconds[0] += timeout
            return is_ended

        def set(self) -> None:
            is_over.put(True)

    monkeypatch.setattr("adapruner.base.progress.time", SimpleNamespace(monotonic=lambda: seconds[0], time=time.time))
    monkeypatch.setattr("adapruner.base.progress.threading", SimpleNamespace(Thread=threading.Thread, Event=Minutes))
    reporter = Reporter()
    with reporter.stage("searching", 200) as advance:
        for steps in (3.4, 0, 49.6, 147.2):
            is_waiting.get()
            advance(steps, "best loss 2.5")
            is_over.put(False)
    with reporter.stage("saving"):
        pass
    with pytest.raises(RuntimeError, match="cannot be read"), reporter.stage("loading"):  # noqa: PT012
        is_over.put(False)
        raise RuntimeError("cannot be read")
    assert [line.partition(": done")[0] for line in capsys.readouterr().err.splitlines()] == [
        "searching: 3 of 200 after 1 min, best loss 2.5",
        "searching: 3 of 200 after 2 min, best loss 2.5",
        "searching: 53 of 200 after 3 min, about 9 min left, best loss 2.5",
        "searching: 200 of 200 after 4 min, best loss 2.5",
        "searching",
        "saving",
        "loading: 1 min",
    ]


def test_help_has_examples_and_names_options(capsys):
    with contextlib.suppress(SystemExit):
        main(["prune", "--help"])
    text = capsys.readouterr().out
    assert text.count("adapruner prune ") >= 4  # usage and three examples
    assert "as mix,notes.txt:0.5" in " ".join(text.replace("│", " ").split())
    assert "--empty" not in text


def test_a_misspelled_alias_is_named_before_the_hub_is_asked(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "smolm2"])
    assert capsys.readouterr().err == "adapruner: no model at smolm2; did you mean smollm2?\n"


def test_bars_stand_below_each_other():
    """Whatever the name of the stage and its number of steps, within 80 columns."""
    places = set()
    for name, total in (("cutting", 1), ("measuring", 48), ("comparing abilities", 1024)):
        terminal = io.StringIO()
        reporter = Reporter()
        reporter.console = Console(file=terminal, force_terminal=True, width=80, color_system=None)
        reporter.shows_bars = True
        with reporter.stage(name, total):
            pass
        [*_, last] = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if "━" in line]
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).rstrip()
        assert len(shown) <= 80
        places.add((shown.index("━"), shown.rindex("━")))
    assert len(places) == 1

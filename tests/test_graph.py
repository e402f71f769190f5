"""The engine of a run, with toy nodes: keys, what is missing, what has changed, damage, kills, several commands."""

import contextlib
import doctest
import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from adapruner import AdaPrunerError
from adapruner.base.files import replace
from adapruner.base.progress import Reporter
from adapruner.graph import nodes as declaring
from adapruner.graph.folder import Folder
from adapruner.graph.making import Making
from adapruner.graph.nodes import Form, Graph, GraphError, Record
from run_helpers import fast_starts

JSON: Form[Any] = Form(
    lambda value, path: path.write_text(json.dumps(value)), lambda path: json.loads(path.read_text())
)


class Options(BaseModel):
    size: int = 3
    factor: int = 2
    ratio: int = 1
    text: str = "text.txt"
    device: str = "cpu"
    wants_extra: bool = False


def toy_graph() -> Graph:
    """numbers → doubled → total, with a text from outside, and something that only some runs want."""
    graph = Graph(Options, given=("calls",), unkeyed=("config",))

    @graph.leaf(lambda path: {"text": path.name, "content": path.read_text() if path.exists() else None})
    def source(text: str) -> Path:
        return Path(text)

    @graph.leaf()
    def place(device: str) -> str:
        return device

    @graph.in_memory
    def scale(factor: int) -> int:
        return factor

    @graph.costly
    def letters(source: Path, place: str, calls: list[str]) -> str:
        calls.append("letters")
        return source.read_text()

    @graph.kept("numbers.json", JSON)
    def numbers(size: int, letters: str, calls: list[str], work: Path) -> list[int]:
        calls.append("numbers")
        parts = []
        for number in range(size):
            part = work / f"{number}.json"
            if not part.is_file():
                part.write_text(str(number * len(letters)))
            parts.append(json.loads(part.read_text()))
        return parts

    @graph.kept("extra.json", JSON, is_wanted=lambda wants_extra: wants_extra)
    def extra(numbers: list[int], calls: list[str]) -> int:
        calls.append("extra")
        return 100

    @graph.kept("doubled.json", JSON)
    def doubled(numbers: list[int], scale: int, calls: list[str]) -> list[int]:
        calls.append("doubled")
        return [scale * number for number in numbers]

    @graph.kept("total.json", JSON, is_result=True)
    def total(doubled: list[int], extra: int | None, ratio: int, calls: list[str], key: str) -> int:
        calls.append("total")
        return ratio * sum(doubled) + (extra or 0)

    graph.check()
    return graph


GRAPH = toy_graph()


def making(folder: Path, others: tuple[Folder, ...] = (), graph: Graph = GRAPH, **options: Any) -> Making:
    values = Options(text=str(folder.parent / "text.txt"), **options)
    run = Folder(folder)
    return Making(
        graph,
        dict(values),
        values.model_dump(mode="json"),
        {"calls": [], "config": values},
        folder=run,
        reporter=Reporter(quiet=True),
        others=others,
    )


def made(folder: Path, **options: Any) -> list[str]:
    """Makes what is missing; returns the functions that were called."""
    run = making(folder, **options)
    run.make_missing()
    calls: list[str] = run.given["calls"]
    return calls


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    return tmp_path / "run"


def value(folder: Path, name: str = "total") -> Any:
    return json.loads((folder / f"{name}.json").read_text())


# Declarations


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda graph: graph.in_memory(lambda sizes: 0), "names sizes: no option"),
        (lambda graph: graph.in_memory(lambda work: 0), "names work: no option"),
        (lambda graph: graph.kept("a", JSON, name="a")(lambda later: 0), "names later: no option"),
        (lambda graph: graph.in_memory(lambda config: 0), "of which its key would not depend"),
        (lambda graph: graph.kept("a", JSON, name="size")(lambda: 0), "size stands for something else"),
        (lambda graph: graph.in_memory(lambda: Options().size), "reads Options"),
        (lambda graph: graph.kept("a", JSON, is_wanted=lambda letters: 1, name="a")(lambda: 0), "letters, which is no"),
        (lambda graph: (graph.in_memory(lambda size: 0), graph.check()), "nothing needs <lambda>"),
    ],
)
def test_a_declaration_that_forgets_something_is_an_error(declare, message):
    graph = Graph(Options, unkeyed=("config",))
    with pytest.raises(GraphError, match=message):
        declare(graph)


def test_the_example_of_a_graph_runs():
    outcome = doctest.testmod(declaring)
    assert outcome.attempted > 3
    assert not outcome.failed


# Keys


def test_keys_are_of_what_is_reached_and_of_nothing_else(folder):
    def keys(**options: Any) -> dict[str, str]:
        run = making(folder, **options)
        return {node.path: run.record(node).key for node in run.wanted}

    def changed(**options: Any) -> set[str]:
        now, then = keys(**options), keys()
        return {path for path in now.keys() | then.keys() if now.get(path) != then.get(path)}

    assert changed() == changed(device="gpu") == set()
    assert changed(size=4) == {"numbers.json", "doubled.json", "total.json"}
    assert changed(factor=5) == {"doubled.json", "total.json"}  # through a node in memory
    assert changed(ratio=2) == {"total.json"}
    assert changed(wants_extra=True) == {"extra.json", "total.json"}
    before = keys()
    (folder.parent / "text.txt").write_text("abcd")
    assert keys().keys() == before.keys()
    assert not set(keys().values()) & set(before.values())


def test_what_is_made_is_not_made_again_and_what_is_costly_not_held(folder):
    run = making(folder)
    run.make_missing()
    assert run.given["calls"] == ["letters", "numbers", "doubled", "total"]
    assert "letters" not in run.values
    assert value(folder) == 2 * (0 + 3 + 6)
    assert made(folder) == []
    assert not (folder / "unfinished").exists()


def test_a_result_is_remade_when_removed_and_others_when_needed(folder):
    made(folder)
    (folder / "numbers.json").unlink()
    assert made(folder) == []
    (folder / "total.json").unlink()
    assert made(folder) == ["total"]
    (folder / "doubled.json").unlink()
    (folder / "total.json").unlink()
    assert made(folder) == ["letters", "numbers", "doubled", "total"]


def test_damage_is_recognised_and_said(folder, capsys):
    made(folder)
    (folder / "doubled.json").write_text("[1]")
    run = making(folder)
    run.reporter = Reporter()
    run.make_missing()
    assert run.given["calls"] == ["doubled"]
    assert "doubled.json was changed or damaged" in capsys.readouterr().err
    assert value(folder, "doubled") == [0, 6, 12]


def test_what_was_made_otherwise_is_refused_with_what_changed(folder):
    made(folder)
    with pytest.raises(AdaPrunerError, match=r"\(factor 2 → 5\): doubled.json, total.json would be rebuilt"):
        making(folder, factor=5).refuse_outdated()
    (folder.parent / "text.txt").write_text("abcd")
    with pytest.raises(AdaPrunerError, match=r"another content of text\.txt"):
        making(folder).refuse_outdated()
    (folder.parent / "text.txt").unlink()
    making(folder).refuse_outdated()
    assert made(folder) == []
    (folder.parent / "text.txt").write_text("abc")
    assert made(folder, factor=5) == ["doubled", "total"]


def test_what_another_run_holds_is_taken_over(folder):
    made(folder)
    other = folder.with_name("other")
    run = making(other, others=(Folder(folder),), ratio=3)
    run.make_missing()
    assert run.given["calls"] == ["total"]
    assert value(other, "doubled") == [0, 6, 12]


def test_what_is_taken_counts_whatever_it_was_made_from(folder):
    made(folder, factor=7)
    other = folder.with_name("other")
    run = making(other, others=(Folder(folder),), ratio=3)
    run.taken = {"doubled.json": making(folder, factor=7).record(GRAPH.nodes["doubled"])}  # type: ignore[arg-type]
    run.make_missing()
    assert run.given["calls"] == ["total"]
    assert value(other) == 3 * 7 * 9
    assert run.record(GRAPH.nodes["total"]).key != making(other, ratio=3).record(GRAPH.nodes["total"]).key  # type: ignore[arg-type]


def test_what_an_interrupted_run_with_other_options_made_is_removed(folder):
    """Results that are there already do not need it; the run would be refused next time."""
    made(folder)
    other = making(folder, size=5)
    other.make(other.wanted[0])
    assert making(folder).outdated().keys() == {"numbers.json"}
    assert made(folder) == []
    assert making(folder).outdated() == {}
    assert value(folder) == 18


def test_what_is_read_again_in_no_time_is_only_held_for_the_next_node(folder):
    graph = Graph(Options, given=("calls", "run"))

    @graph.leaf()
    def is_mapped(device: str) -> bool:
        return device == "cpu"

    @partial(graph.costly, is_read_again_if="is_mapped")
    def weights(calls: list[str]) -> list[int]:
        calls.append("weights")
        return [1, 2]

    @graph.costly
    def copied(weights: list[int], calls: list[str]) -> list[int]:
        calls.append("copied")
        return weights if len(calls) > 9 else [*weights]

    @graph.kept("a.json", JSON)
    def first(weights: list[int], copied: list[int]) -> int:
        return 1

    @graph.kept("b.json", JSON)
    def second(first: int, copied: list[int], run: Making) -> list[str]:
        return sorted(run.values)

    @graph.kept("c.json", JSON, is_result=True)
    def third(second: list[str], weights_later: Callable[[], list[int]], copied: list[int]) -> int:
        return sum(weights_later()) + sum(copied)

    for device, held, calls in (
        ("cpu", ["copied", "first", "is_mapped"], ["weights", "copied", "weights"]),
        ("gpu", ["copied", "first", "is_mapped", "weights"], ["weights", "copied"]),
    ):
        run = making(folder / device, graph=graph, device=device)
        run.given = {**run.given, "run": run}
        run.make_missing()
        assert run.given["calls"] == calls
        assert value(folder / device, "b") == held
        assert value(folder / device, "c") == 6
        for name in ("b.json", "c.json"):
            (folder / device / name).unlink()
        resumed = making(folder / device, graph=graph, device=device)
        resumed.given = {**resumed.given, "run": resumed}
        resumed.make_missing()
        assert value(folder / device, "b") == held


def test_mistakes_are_found_before_the_work(folder):
    graph = Graph(Options, given=("calls",), unkeyed=("config",))

    @graph.costly
    def heavy(calls: list[str]) -> int:
        calls.append("heavy")
        return 1

    @graph.in_memory
    def checked(size: int) -> int:
        if size > 9:
            raise AdaPrunerError("`size` is too large")
        return size

    @graph.kept("a.json", JSON)
    def first(heavy: int) -> int:
        return heavy

    @graph.kept("b.json", JSON, is_result=True)
    def last(first: int, checked: int) -> int:
        return first + checked

    run = making(folder, graph=graph, size=10)
    with pytest.raises(AdaPrunerError, match="too large"):
        run.prepare(run.missing())
    assert run.given["calls"] == []


def test_what_is_made_early_is_made_once_and_kept(folder, capsys):
    graph = Graph(Options, given=("calls",), unkeyed=("config",))

    @graph.leaf(lambda path: {"text": path.name, "content": path.read_text() if path.exists() else None})
    def source(text: str) -> Path:
        return Path(text)

    @graph.kept("length.json", JSON, is_early=True, is_result=True)
    def length(source: Path, calls: list[str]) -> int:
        calls.append("length")
        return len(source.read_text())

    @graph.leaf(lambda share: share)
    def share(length: int, size: int) -> int:
        if size > length:
            raise AdaPrunerError("`size` is too large")
        return length - size

    @graph.kept("rest.json", JSON, is_result=True)
    def rest(share: int, calls: list[str]) -> int:
        calls.append("rest")
        return share

    refused = making(folder, graph=graph, size=4)
    with pytest.raises(AdaPrunerError, match="too large"):
        refused.prepare(refused.missing())
    run = making(folder, graph=graph, size=1)
    assert [node.path for node in run.missing()] == ["length.json", "rest.json"]
    run.prepare(run.missing())
    assert not folder.exists()
    run.make_missing()
    assert run.given["calls"] == ["length", "rest"]
    assert (value(folder, "length"), value(folder, "rest")) == (3, 2)
    # From here on, the text is not needed: not for the same options, nor for others.
    (folder.parent / "text.txt").unlink()
    for size, called in ((1, []), (2, ["rest"])):
        run = making(folder, graph=graph, size=size)
        run.make_missing()
        assert run.given["calls"] == called
    # What is damaged is rebuilt from its text, if that is at hand.
    (folder / "length.json").write_text("7")
    with pytest.raises(FileNotFoundError):
        making(folder, graph=graph, size=2).make_missing()
    (folder.parent / "text.txt").write_text("abc")
    run = making(folder, graph=graph, size=2)
    run.reporter = Reporter()
    run.make_missing()
    assert run.given["calls"] == ["length"]
    assert "length.json was changed or damaged" in capsys.readouterr().err
    assert value(folder, "length") == 3


def _killed_at(folder: Path, statement: int) -> None:
    """Runs in a process that is killed before a line of the engine or of the nodes is executed."""
    left = statement
    files = {"making.py", "folder.py", "files.py", "test_graph.py"}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in files:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    import sys

    sys.settrace(trace)
    made(folder, wants_extra=True)
    sys.settrace(None)
    (folder / "ended").touch()


def test_a_kill_between_any_two_statements_loses_nothing_and_leaves_nothing(folder):
    context = fast_starts()
    undisturbed = folder.with_name("undisturbed")
    made(undisturbed, wants_extra=True)
    expected = {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()}
    statement, kills = 3, 0
    while not (folder / "ended").exists():
        process = context.Process(target=_killed_at, args=(folder, statement))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        statement += 7 + statement // 6
    assert kills > 12
    made(folder, wants_extra=True)
    (folder / "ended").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == expected
    assert not (folder / "unfinished").exists()


# The run folder


def test_what_is_taken_over_replaces_the_whole_folder(tmp_path):
    source, target = Folder(tmp_path / "source"), Folder(tmp_path / "target")
    for run, names in ((source, ("a", "b")), (target, ("a", "c"))):
        run.place("model").mkdir(parents=True)
        for name in names:
            (run.place("model") / name).write_text(f"{run.path.name} {name}")
    record = Record(name="model", version=1, options={}, leaves={}, inputs={})
    source.finish("model", record)
    target.take_over("model", source)
    assert {path.name: path.read_text() for path in target.place("model").iterdir()} == {
        "a": "source a",
        "b": "source b",
    }
    assert target.is_made("model", record.key)


def test_a_folder_takes_the_place_of_a_file(tmp_path):
    (tmp_path / "compensated").touch()
    for content in ("{}", '{"a": 1}'):
        partial_path = tmp_path / "partial"
        partial_path.mkdir()
        (partial_path / "config.json").write_text(content)
        replace(partial_path, tmp_path / "compensated")
        assert [path.name for path in tmp_path.iterdir()] == ["compensated"]
        assert (tmp_path / "compensated" / "config.json").read_text() == content


def test_files_are_known_by_their_content(tmp_path):
    run, record = Folder(tmp_path, editable=["notes.md"]), Record(name="a", version=1, options={}, leaves={}, inputs={})
    run.place("a").mkdir()
    small, large, notes = (tmp_path / "a" / name for name in ("small.json", "large.safetensors", "notes.md"))
    small.write_text('{"a": 1}')
    notes.write_text("mine")
    save_file({"a": torch.zeros(2 << 20)}, large)
    run.finish("a", record)
    assert run.is_made("a", record.key)
    small.write_text('{"a": 2}')
    assert not run.is_made("a", record.key)
    assert run.is_damaged("a", record.key)
    small.write_text('{"a": 1}')
    notes.write_text("mine, later")
    assert run.is_made("a", record.key)
    os.truncate(large, large.stat().st_size - 4)
    assert not run.is_made("a", record.key)
    large.unlink()
    assert not run.is_made("a", record.key)
    assert not run.is_damaged("a", record.key)


def test_one_of_several_processes_takes_part_and_keeps_nothing(folder):
    run = making(folder)
    run.make(run.wanted[0])
    assert run.take_part(run.wanted[1]) == [0, 6, 12]
    assert not (folder / "doubled.json").exists()


def test_one_command_at_a_time_has_a_folder(tmp_path):
    run = Folder(tmp_path / "run")
    with contextlib.suppress(KeyError), run.locked():
        with pytest.raises(AdaPrunerError, match="another command is running in"), run.locked():
            pass
        raise KeyError
    with run.locked():
        pass


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that grants a lock to everybody."""
    lock = contextlib.nullcontext()
    monkeypatch.setattr("adapruner.graph.folder.FileLock", lambda _: SimpleNamespace(acquire=lambda timeout: lock))
    monkeypatch.setattr("adapruner.graph.folder._SECONDS_BETWEEN_BEATS", 0.05)


@pytest.mark.usefixtures("no_locks")
def test_one_command_at_a_time_has_a_folder_without_locks(tmp_path):
    run, again = Folder(tmp_path / "run"), Folder(tmp_path / "run")
    with run.locked(), pytest.raises(AdaPrunerError, match="another command is running in"), again.locked():
        pass
    # Killed commands: of this machine, of another one, and in the middle of writing.
    for left in (f"{socket.gethostname()} {2**22 + 1}", "elsewhere 1", "elsew"):
        (run.path / ".running").write_text(left)
        with again.locked():
            assert (run.path / ".running").read_text() == f"{socket.gethostname()} {os.getpid()}"
        assert not (run.path / ".running").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), NotImplementedError("no flock")])
def test_a_file_system_that_cannot_lock_is_named(error, tmp_path, monkeypatch):
    def fail(timeout: float) -> None:
        raise error

    monkeypatch.setattr("adapruner.graph.folder.FileLock", lambda _: SimpleNamespace(acquire=fail))
    with pytest.raises(AdaPrunerError, match=f"cannot write to .*: .*{error.args[-1]}"), Folder(tmp_path).locked():
        pass


def test_records_that_a_kill_cut_off_are_of_nothing(folder):
    made(folder)
    for record in (folder / "keys").iterdir():
        record.write_bytes(record.read_bytes()[:-20])
    assert made(folder) == ["letters", "numbers", "doubled", "total"]
    assert made(folder) == []

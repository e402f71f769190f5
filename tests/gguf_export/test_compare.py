"""Models side by side: what is dominated, what the page shows, and that both engines agree on a tiny model."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner import PruneConfig
from adapruner.checkpoint import save_checkpoint
from adapruner.comparison import AXES, Comparison, Point
from adapruner.errors import AdaPrunerError
from adapruner.evaluation import Perplexity, Rate
from adapruner.gguf import write_gguf
from adapruner.planning import make_plan
from adapruner.report import render_comparison
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from adapruner.verbs._compare import _last_model


def a_point(model: str, perplexity: float = 8.0, size: int = 1, speed: float = 1.0) -> Point:
    rate = Rate(median=speed, least=speed, greatest=speed)
    quality = Perplexity(perplexity=perplexity, text="t", seq_len=9, windows=1, stride=9, predicted_bytes=8)
    return Point(model=model, engine="llama.cpp", type="q8_0", size=size, perplexity=quality, prefill=rate, decode=rate)


def compared(points: list[Point]) -> Comparison:
    return Comparison(points=points, prompt=8, new_tokens=4, repetitions=1, device="cpu")


def test_dominated_points() -> None:
    """Every combination of three values, so that there are ties, and speeds that differ by less than is measured."""
    levels = itertools.product((2.0, 4.0, 8.0), (100, 101, 200), (50.0, 51.0, 60.0))
    points = [a_point(str(number), *values) for number, values in enumerate(levels)]
    dominated = compared(points).dominated
    by_name = {point.name: point for point in points}
    for point, axis in itertools.product(points, AXES):
        better = set()
        for other in points:
            fewer_bits = other.perplexity.perplexity - point.perplexity.perplexity
            if axis == "size":
                at_least, more = other.size <= point.size, other.size < point.size
            else:  # 51 is not measurably faster than 50
                at_least = getattr(other, axis).median >= getattr(point, axis).median - 1
                more = getattr(other, axis).median > getattr(point, axis).median + 1
            if (fewer_bits < 0 and at_least) or (fewer_bits == 0 and more):
                better.add(other.name)
        named = dominated.get(point.name, {}).get(axis)
        assert (named in better) if better else (named is None)
        assert named is None or by_name[named].perplexity.perplexity == min(
            by_name[name].perplexity.perplexity for name in better
        )


def test_the_page_escapes_names() -> None:
    evil = "<img src=x onerror=alert(1)></script><b>"
    page = render_comparison(compared([a_point(evil), a_point("other", size=9)]))
    assert page.count('class="plot"') == 3
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "size: &lt;img" in page  # which dominates the other
    # In each plot, the dominated point is hollow.
    assert page.count(' hollow"') == sum(
        len(axes) for axes in compared([a_point(evil), a_point("other", size=9)]).dominated.values()
    )


@pytest.fixture
def models(
    tiny: Callable[..., PreTrainedModel], bytes_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> tuple[Path, Path, Path]:
    """A dense model, a run folder with a pruned one whose layers differ, and a file."""
    dense = tiny("llama", attention_bias=False, mlp_bias=False, num_hidden_layers=12)
    structure = build_structure(dense)
    counts = [max(1, block.groups - block.layer) for block in structure.blocks]
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(8))
    pruned = prune_model(dense, structure, make_plan(structure, scores, counts))
    save_checkpoint(dense, bytes_tokenizer, tmp_path / "dense")
    save_checkpoint(pruned, bytes_tokenizer, tmp_path / "run" / "model")
    write_gguf(dense, bytes_tokenizer, tmp_path / "file.gguf", "f32")
    return tmp_path / "dense", tmp_path / "run", tmp_path / "file.gguf"


def test_two_models_and_a_file(models: tuple[Path, ...], texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("cyllama")
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("\n\n".join(texts * 30))
    comparison = adapruner.compare(
        models,
        page,
        str(text),
        seq_len=16,
        limit=6,
        types=["f32,q8_0"],
        engines=["transformers", "llama.cpp"],
        prompt=8,
        new_tokens=4,
        repetitions=2,
    )
    dense, run, file = map(str, models)
    found = {(point.model, point.engine, point.type): point for point in comparison.points}
    assert list(found) == [
        *((model, engine, kind) for model in (dense, run) for engine, kind in ENGINES),
        (file, "transformers", "float32"),
        (file, "llama.cpp", "gguf"),
    ]
    for model in (dense, run):
        exact = found[model, "transformers", "float32"]
        for kind, tolerance in (("f32", 2e-3), ("q8_0", 2e-2)):
            assert found[model, "llama.cpp", kind].bits_per_byte == pytest.approx(exact.bits_per_byte, rel=tolerance)
        assert found[model, "llama.cpp", "q8_0"].size < found[model, "llama.cpp", "f32"].size
    assert found[run, "llama.cpp", "f32"].size < found[dense, "llama.cpp", "f32"].size
    assert found[file, "llama.cpp", "gguf"].size == models[2].stat().st_size
    assert found[file, "llama.cpp", "gguf"].bits_per_byte == found[dense, "llama.cpp", "f32"].bits_per_byte
    assert all(point.decode.least <= point.decode.median <= point.decode.greatest for point in comparison.points)
    assert f"{comparison.points[0].bits_per_byte:.4f}" in page.read_text()
    assert not list(tmp_path.glob(".adapruner-*"))


def test_the_last_model_of_a_run(models: tuple[Path, ...]) -> None:
    run = models[1]
    shutil.copytree(run / "model", run / "recovered")
    assert _last_model(str(run)) == str(run / "recovered")
    config = PruneConfig.from_options(model=str(models[0]), ratio=0.2, recover="self")
    # A file of that name beside a model says nothing.
    (run.parent / "config.yaml").write_text("training: {lr: 1}")
    assert _last_model(str(run)) == str(run / "recovered")
    (run / "keys").mkdir()
    config.save(run / "config.yaml")
    assert _last_model(str(run)) == str(run / "recovered")
    # A run without recovery has replaced it.
    config.model_copy(update={"recover": None}).save(run / "config.yaml")
    assert _last_model(str(run)) == str(run / "model")
    config.model_copy(update={"ratio": (0.2, 0.3)}).save(run / "config.yaml")
    with pytest.raises(AdaPrunerError, match=r"ratio-0.2, .*ratio-0.3"):
        _last_model(str(run))


ENGINES = (("transformers", "float32"), ("llama.cpp", "f32"), ("llama.cpp", "q8_0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ["q8_0,q9"]}, "not q9"),
        ({"types": [","]}, "`types` must be some of"),
        ({"models": []}, "name the models"),
        ({"seq_len": 1}, "`seq_len` 1 is too short"),
        ({"repetitions": 0}, "must be at least 1"),
        ({"tasks": ["boolq"]}, "add it to `engine`"),
        ({"output": "text.txt"}, "exists"),
    ],
)
def test_bad_options(
    options: dict[str, object], message: str, models: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    monkeypatch.setattr("adapruner.verbs._compare.open_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(AdaPrunerError, match=re.escape(message)):
        adapruner.compare(**{"models": models, "perplexity": "text.txt", "types": ["f16"]} | options)

"""The kit for terms, families, datasets and objectives finds what is wrong; plugins are loaded if they are named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapruner import AdaPrunerError, PruneConfig, testing
from adapruner.importance import TERMS, register_term
from adapruner.measurement import Statistics
from adapruner.models import architecture_of
from adapruner.run.options import register_extensions


@pytest.fixture(autouse=True)
def _terms_stay() -> Iterator[None]:
    before = dict(TERMS)
    yield
    TERMS.clear()
    TERMS.update(before)


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if "routing" not in term.needs])
def test_the_terms_of_the_package_pass(name: str) -> None:
    testing.check_term(name)


@pytest.mark.parametrize(
    ("unit", "function", "message"),
    [
        ("inputs", lambda statistics: statistics.input_mean.mean(0), "is negative"),
        ("vectors", lambda statistics: statistics.column_squared, r"expected \[\d+\], vectors"),
        ("inputs", lambda statistics: statistics.input_squared[0], "depends on the order of the samples"),
        ("inputs", lambda statistics: statistics.input_squared.std(0), "of a single sample is not finite"),
        ("inputs", lambda statistics: torch.ones_like(statistics.column_squared), "all groups the same score"),
    ],
)
@pytest.mark.filterwarnings("ignore:std")
def test_a_wrong_term_is_found(unit: str, function: Callable[[Statistics], torch.Tensor], message: str) -> None:
    def own(statistics: Statistics) -> torch.Tensor:
        return function(statistics)

    register_term(unit=unit, family="own")(own)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=message):
        testing.check_term("own")


def test_a_family_passes_and_a_wrong_description_does_not() -> None:
    testing.check_family("qwen2")
    right = architecture_of(testing.tiny_model("qwen2").config)
    assert right.feed_forward is not None
    without_gate = {name: rows for name, rows in right.feed_forward.inputs.items() if "gate" not in name}
    wrong = right.changed(feed_forward=right.feed_forward.model_copy(update={"inputs": without_gate}))
    with pytest.raises(AssertionError, match=r"qwen2: .*per-layer"):
        testing.check_family("qwen2", wrong)
    bloom = testing.tiny_model("bloom").config
    with pytest.raises(AssertionError, match=r"bloom: .*whole attention"):
        testing.check_family(bloom, architecture_of(bloom).changed(whole=("attention",)))


def test_a_dataset_passes_and_one_without_three_parts_does_not(text_file: Path, tmp_path: Path) -> None:
    testing.check_source(str(text_file))
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(AdaPrunerError, match="there is no text in"):
        testing.check_source(str(tmp_path / "one.txt"))


def test_a_plugin_is_imported_only_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with two modules, each an entry point, as it is installed."""
    for name in ("named", "unnamed"):
        (tmp_path / f"plugin_{name}.py").write_text(
            "from adapruner.importance import register_term\n\n"
            "@register_term(unit='inputs', family='plugin')\n"
            f"def of_{name}(statistics):\n    return statistics.column_squared\n"
        )
    about = tmp_path / "plugins-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[adapruner]\nnamed = plugin_named\nunnamed = plugin_unnamed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_extensions(PruneConfig.from_options(model="m"))
    assert not {"plugin_named", "plugin_unnamed"} & set(sys.modules)
    register_extensions(PruneConfig.from_options(model="m", plugins="named"))
    monkeypatch.delitem(sys.modules, "plugin_named")
    assert "of_named" in TERMS
    assert "of_unnamed" not in TERMS
    assert "plugin_unnamed" not in sys.modules
    with pytest.raises(AdaPrunerError, match=r"has the plugin 'nmaed' .*named, unnamed"):
        register_extensions(PruneConfig.from_options(model="m", plugins=("nmaed",)))

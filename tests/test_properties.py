"""What holds for any input: a config, a recipe, a plan or the name of a text is valid or refused, and nothing else.

`HYPOTHESIS_PROFILE=thorough` tries more than 10,000 inputs of configs and plans; the default about 1,000.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic.fields import FieldInfo
from transformers import LlamaConfig

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import RATIO_TOLERANCE, Budget, Profile, kept_counts
from adapruner.budget.plan import BlockPlan, PruningPlan
from adapruner.model.loading import empty_model
from adapruner.options import PruneConfig
from adapruner.structure.build import build_structure
from adapruner.text.sources import parse_source

# Files are written again and again into the same folder, which is meant.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=150, **_COMMON)
settings.register_profile("thorough", max_examples=1500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# With halves of characters, which is what Python makes of names of files that are no UTF-8.
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**80), max_value=2**80)
    | st.floats()
    | ANY_TEXT
    | st.sampled_from(["auto", "uniform", "none", "paper", "mix", "0.2", "1e3", "5", "lora"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4), max_leaves=8
)


def values_of(options: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some options with any value, and now and then one that there is not."""
    names = st.sampled_from(sorted(options.model_fields)) | ANY_TEXT
    return st.dictionaries(names, ANYTHING, max_size=5)


@given(values_of(PruneConfig))
def test_options_are_valid_or_refused(options):
    try:
        config = PruneConfig.from_options(**{"model": "m"} | options)
    except AdaPrunerError:
        return
    assert PruneConfig.from_options(**config.model_dump()) == config
    assert 0 < config.ratio < 1
    assert all(math.isfinite(number) for number in config.model_dump().values() if isinstance(number, int | float))


def values_in_range(field: FieldInfo) -> st.SearchStrategy[Any]:
    """What an option takes, as far as its type and its bounds say."""
    kinds = [field.annotation, *get_args(field.annotation)]
    bounds = {name: value for bound in field.metadata for name, value in asdict(bound).items()}
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if float in kinds:
        least, most = bounds.get("ge", bounds.get("gt", -1e9)), bounds.get("le", bounds.get("lt", 1e9))
        return st.floats(least, most, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if int in kinds:
        return st.integers(bounds["ge"], 2**32 - 1)
    if bool in kinds:
        return st.booleans()
    return st.lists(st.text(), max_size=3).map(tuple) if ... in kinds else st.text()


# Their values are not told by their annotation.
_OTHERS = ("ratio", "searched", "heal")
FRACTION = st.floats(0, 1, exclude_min=True, exclude_max=True)


def valid_options(options: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values_in_range(field) for name, field in options.model_fields.items() if name not in _OTHERS}
    return st.fixed_dictionaries({}, optional=fields)


@given(
    valid_options(PruneConfig),
    FRACTION | st.lists(FRACTION, min_size=1, unique=True),
    st.sampled_from(["none", "300k", 7, "1.5M"]),
)
def test_a_config_survives_its_file(tmp_path, options, ratio, heal):
    """Whatever is valid comes back from config.yaml as it was, also words that look like numbers."""
    try:
        config = PruneConfig.from_options(**{"model": "m", "ratio": ratio, "heal": heal} | options)
    except AdaPrunerError:
        return
    config.save(tmp_path / "config.yaml")
    assert PruneConfig.load(tmp_path / "config.yaml") == config


def refusal(read: Callable[[Path], Any], path: Path) -> str | None:
    """What is said of a file that is refused; None if it is not."""
    try:
        read(path)
    except AdaPrunerError as error:
        return str(error)
    return None


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    """Valid plans of any model."""
    blocks = []
    for layer in range(draw(st.integers(1, 4))):
        for kind in ("heads", "channels"):
            groups = draw(st.integers(1, 12))
            kept = draw(st.sets(st.integers(0, groups - 1), min_size=1))
            blocks.append(BlockPlan(layer=layer, kind=kind, groups=groups, kept=tuple(sorted(kept))))
    total = draw(st.integers(1, 10**12))
    return PruningPlan(
        model_type=draw(st.sampled_from(["llama", "gpt2"])),
        head_granularity=draw(st.sampled_from(["kv-group", "query-head"])),
        total_parameters=total,
        removed_parameters=draw(st.integers(0, total - 1)),
        blocks=tuple(blocks),
    )


@given(plans())
def test_a_plan_survives_its_file(tmp_path, plan):
    path = tmp_path / "plan.json"
    plan.save(path)
    again = PruningPlan.load(path)
    assert (again, again.hash) == (plan, plan.hash)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert PruningPlan.load(path).hash == plan.hash


def check_loaded(path: Path) -> None:
    """A plan that makes sense, or a refusal that names the file."""
    message = refusal(PruningPlan.load, path)
    if message is not None:
        assert str(path) in message
        return
    plan = PruningPlan.load(path)
    assert 0 <= plan.ratio < 1
    for block in plan.blocks:
        assert sorted(set(block.kept)) == list(block.kept)
        assert all(0 <= number < block.groups for number in block.kept)
    assert len(plan.explain().rows) > 0


def test_a_layer_that_no_model_has_is_refused(tmp_path):
    """Showing the plan would go through all layers before it."""
    block = {"layer": 10**11, "kind": "channels", "groups": 8, "kept": [1]}
    content = {"model_type": "llama", "head_granularity": "kv-group", "total_parameters": 9, "removed_parameters": 1}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content | {"blocks": [block]}))
    with pytest.raises(AdaPrunerError, match=r"blocks\.0\.layer: Input should be less than 65536"):
        PruningPlan.load(path)


def places(content: Any, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where something is inside of JSON."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [here, *(place for key, value in inside for place in places(value, (*here, key)))]


@given(plans(), st.data())
def test_plans_that_were_changed(tmp_path, plan, data):
    """One thing inside is another, or gone, or there twice; or the file is cut off."""
    content = json.loads(plan.model_dump_json())
    *where, last = data.draw(st.sampled_from(places(content)[1:]))
    parent = content
    for key in where:
        parent = parent[key]
    change = data.draw(st.sampled_from(["another", "gone", "twice", "cut off"]))
    if change == "another":
        parent[last] = data.draw(ANYTHING | st.integers(-2, 13))
    elif change == "gone":
        del parent[last]
    elif change == "twice" and isinstance(parent, list):
        parent.append(parent[last])
    text = json.dumps(content)
    path = tmp_path / "plan.json"
    path.write_text(text[: data.draw(st.integers(0, len(text)))] if change == "cut off" else text)
    check_loaded(path)


@given(
    ANY_TEXT
    | st.lists(
        st.sampled_from(
            ["hf", ":", "@", "report", "mix", "wikitext2", "c4", "a.txt", ".jsonl", "/", "~", "..", "\0", "a"]
        ),
        max_size=8,
    ).map("".join)
)
def test_names_of_texts_are_valid_or_refused(text):
    try:
        source = parse_source(text)
    except AdaPrunerError:
        return
    assert parse_source(str(source)) == source
    assert source.restrict("report").part != "all"
    assert source.identity == parse_source(str(source)).identity


STRUCTURE = build_structure(
    empty_model(
        LlamaConfig(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=120,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=16,
        )
    )
)


@given(
    st.builds(
        Budget,
        ratio=st.floats(0.001, 0.999),
        allocation=st.just("uniform") | st.builds(Profile, *[st.integers(0, 9)] * 2),
        heads=st.floats(0, 1),
        round_to=st.integers(1, 200),
    )
)
def test_a_budget_is_met_or_refused(budget):
    try:
        counts = kept_counts(STRUCTURE, budget)
    except AdaPrunerError:
        return
    removed = STRUCTURE.removed_parameters(counts)
    assert abs(removed / STRUCTURE.total_parameters - budget.ratio) <= RATIO_TOLERANCE
    for block, count in zip(STRUCTURE.blocks, counts, strict=True):
        assert 1 <= count <= block.groups
        if isinstance(profile := budget.allocation, Profile):
            is_protected = not profile.protect_first <= block.layer < STRUCTURE.layers - profile.protect_last
            assert not is_protected or count == block.groups

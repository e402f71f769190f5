"""The mix of kinds of text that a model writes itself, and windows that keep the names of their kinds."""

import ast
import copy
import re

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers.processors import TemplateProcessing

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.model.generation import continue_texts
from adapruner.text.blends import counts_of, parse_blend
from adapruner.text.sources import parse_source
from adapruner.text.windows import (
    Text,
    draw_windows,
    evaluation_text,
    load_texts_by_use,
    save_texts_by_use,
    text_windows,
)
from adapruner.text.written import kinds, probe_texts, python_functions, served_kinds, write_kinds
from run_helpers import QUICK

KINDS = ["prose", "code", "mathematics", "questions", "dialogue", "instructions", "languages"]


def test_every_beginning_is_filled():
    assert [*kinds()] == KINDS
    for kind in kinds().values():
        for texts in kind:
            assert len(texts) == len(set(texts)) > 10
            assert not any(re.search(r"(?<!\{)\{\w+\}", text) for text in texts)
    # The first ones are of all templates.
    assert len({text[:12] for text in kinds()["prose"].openings[:5]}) == 5


def test_the_functions_of_the_standard_library_are_whole():
    functions = python_functions()
    assert len(functions) > 500
    for text in functions[::50]:
        [function] = ast.parse(text).body
        assert ast.get_docstring(function)


@pytest.fixture
def writing(model, tokenizer):
    def write(part: str = "calibration", seed: int = 0, count: int = 4, advance=None) -> dict[str, torch.Tensor]:
        return write_kinds(model, tokenizer, dict.fromkeys(KINDS, count), 12, part, seed, [2], advance)

    return write


def test_a_model_writes_windows_of_every_kind(writing):
    written = writing()
    assert [*written] == KINDS
    assert all(own.shape == (4, 12) and own.dtype == torch.int64 and (own >= 0).all() for own in written.values())
    again, other, objective = writing(), writing(seed=1), writing("objective")
    for kind, own in written.items():
        assert own.equal(again[kind])
        assert not own.equal(other[kind])
        assert not own.equal(objective[kind])


def test_progress_is_told_for_every_token_and_adds_up_to_all_windows(writing):
    told: list[float] = []
    writing(advance=told.append)
    assert sum(told) == pytest.approx(4 * len(KINDS))
    assert max(told) < 2


def test_the_texts_begin_with_prompts_and_openings(writing, model, tokenizer, monkeypatch):
    begun = []

    def note(model, prompts, *rest):
        begun.extend(tokenizer.decode(prompt) for prompt in prompts)
        return continue_texts(model, prompts, *rest)

    monkeypatch.setattr("adapruner.text.written.continue_texts", note)
    writing(count=40)
    without = len(begun)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}w50 {{ m['content'] }} w51{% endfor %}")
    begun.clear()
    writing(count=40)
    chats = sum(text.startswith("w50") and text.endswith("w51") for text in begun)
    assert without > 7
    assert chats == pytest.approx(len(begun) / 2, abs=7)


@pytest.mark.parametrize("form", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_every_window_begins_as_the_tokenizer_begins_a_text(form, model, tokenizer, text_file, monkeypatch):
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    prompts = []

    def note(model, asked, *rest):
        prompts.extend(asked)
        return continue_texts(model, asked, *rest)

    monkeypatch.setattr("adapruner.text.written.continue_texts", note)
    source = parse_source(str(text_file))
    by_source = {
        **write_kinds(model, tokenizer, dict.fromkeys(KINDS, 12), 16, "calibration", 0, [2]),
        **{name: text.windows for name, text in probe_texts(tokenizer, 16).items()},
        "drawn": draw_windows(source, tokenizer, 90, 16, seed=0),
        "joined": text_windows(source, tokenizer, 16),
        "reported": evaluation_text(source, tokenizer, 16, None).windows,
    }
    begins = form.startswith("<s>")
    for windows in by_source.values():
        assert (windows[:, 0] == tokenizer.bos_token_id).all() == begins
    for name in ("drawn", "joined", "reported"):  # the model may write any token
        assert not torch.isin(by_source[name][:, 1:], torch.tensor([id for _, id in special])).any()
    # A text is continued before its end, and a chat template says itself how a text begins.
    assert prompts
    assert all(prompt[-1] != tokenizer.eos_token_id for prompt in prompts)
    assert all((prompt[0] == tokenizer.bos_token_id) == begins for prompt in prompts)


def test_a_language_that_the_tokenizer_spells_is_left_out(tokenizer, monkeypatch):
    def spelled(_, texts, **options):
        pieces = [[*range(len(text.encode()))] if not text.isascii() else [1] for text in texts]
        return type("Encoding", (), {"input_ids": pieces})

    monkeypatch.setattr("adapruner.text.written.tokenize", spelled)
    assert all(text.isascii() for kind in served_kinds(tokenizer).values() for texts in kind for text in texts)
    assert [*served_kinds(tokenizer)] == KINDS


def test_kinds_are_kept_apart_from_the_option_to_the_result(model_folder, text_file, tmp_path):
    options = QUICK | {"calibration": f"mix:0.5,{text_file}", "compensation_windows": 28}
    result = adapruner.prune(str(model_folder), output=tmp_path, **options)
    texts = load_texts_by_use(tmp_path / "windows.safetensors")
    assert set(texts["compensation"].kinds) == {*KINDS, str(text_file)}
    assert result.result.windows["compensation"] == {**dict.fromkeys(KINDS, 2), str(text_file): 14}
    assert result.result.search.by_kind.keys() == set(texts["objective"].kinds)
    kinds, search = texts["objective"].kinds, result.result.search
    mean = sum(loss * kinds.count(kind) for kind, loss in search.by_kind.items()) / len(kinds)
    assert mean == pytest.approx(search.best_loss)
    # The pool is part of what the compensation is fitted on.
    compensation = texts["compensation"].by_kind
    for kind, own in texts["pool"].by_kind.items():
        if kind in KINDS:
            assert all((compensation[kind] == window).all(1).any() for window in own)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_windows_of_all_kinds_are_evenly_mixed(tmp_path_factory, numbers):
    by_kind = {f"k/{kind}": torch.arange(count)[:, None] + 10 * kind for kind, count in enumerate(numbers)}
    text = Text.mixed(by_kind)
    assert {kind: len(own) for kind, own in text.by_kind.items()} == {
        kind: len(own) for kind, own in by_kind.items() if len(own)
    }
    for kind, own in text.by_kind.items():
        assert own.equal(by_kind[kind])
    for end in range(1, len(text) + 1):
        for kind, own in by_kind.items():
            assert abs(text.kinds[:end].count(kind) - len(own) * end / len(text)) <= 1 + len(by_kind) / 2
    path = tmp_path_factory.mktemp("texts") / "a.safetensors"
    save_texts_by_use({"pool": text}, path)
    assert load_texts_by_use(path)["pool"].windows.equal(text.windows)
    assert load_texts_by_use(path)["pool"].kinds == text.kinds


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any), st.integers(1, 20))
def test_the_last_windows_of_every_kind_are_held_out(numbers, count):
    text = Text.mixed({str(kind): torch.arange(own)[:, None] + 100 * kind for kind, own in enumerate(numbers)})
    rest, held_out = (part.by_kind for part in text.held_out(count))
    for kind, own in text.by_kind.items():
        last = held_out.get(kind, own[:0])
        assert torch.cat([rest[kind], last]).equal(own)
        assert (len(last) > 0) == (len(own) > 2)
        assert len(last) <= max(1, len(own) / 10, count * len(own) / len(text) + 0.5)


@given(st.integers(1, 500))
def test_the_windows_of_the_parts_of_a_blend_add_up(count):
    blend = parse_blend("mix,c4:0.3")
    counts = counts_of(blend, count)
    assert sum(counts.values()) == count
    assert all(abs(counts[part.name] - part.share * count) < 1 for part in blend)


def test_every_dataset_has_a_window():
    assert counts_of(parse_blend("c4,ptb:0.001"), 64) == {"c4": 63, "ptb": 1}
    of_few = counts_of(parse_blend("mix,c4:0.001,ptb:0"), 3)
    assert (sum(of_few.values()), of_few["c4"], "ptb" in of_few) == (3, 1, False)
    with pytest.raises(AdaPrunerError, match="1 windows are fewer than the 2 datasets"):
        counts_of(parse_blend("c4,ptb"), 1)


def test_no_text_is_longer_than_what_is_lacking(model, tokenizer, monkeypatch):
    asked = list[int]()

    def noted(model, prompts, new_tokens, *rest):
        asked.append(new_tokens)
        return continue_texts(model, prompts, new_tokens, *rest)

    monkeypatch.setattr("adapruner.text.written.continue_texts", noted)
    [windows] = write_kinds(model, tokenizer, {"prose": 2}, 12, "report", 0, []).values()
    assert windows.shape == (2, 12)
    assert asked[0] == 24  # and not as many as a text may have

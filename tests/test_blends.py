"""Blends of datasets: how they are named and mixed, who learns what of them, and how long a training is."""

import json
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, RecoveryOptions
from adapruner.report.card import trained_sentence
from adapruner.run.recover import RecoveryFolder
from adapruner.text.blends import absolute_blend, parse_blend
from adapruner.text.sources import parse_source
from adapruner.text.windows import text_windows
from adapruner.train.examples import Example, Examples, MixedExamples, Unwritten, collate, most_held_out, read_examples
from adapruner.train.training import total_steps
from run_helpers import exit_code

SHORT: dict[str, Any] = {"seq_len": 16, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3}


KINDS = ("prose", "code", "mathematics", "questions", "dialogue", "instructions", "languages")


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "instructions.jsonl"
    records = [{"instruction": f"w{number} w2", "input": "", "output": f"w3 w{number}"} for number in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def dataset(name: str, count: int, share: float = 1.0, tokens: int = 8) -> Examples:
    """Examples that begin with their number."""
    made = [Example(input_ids=[number] * tokens, labels=[number] * tokens, label_weight=1.0) for number in range(count)]
    return Examples(name, made, made[:1], share)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4", {"c4": 1}),
        ("mix:1", dict.fromkeys(KINDS, 1 / 7)),
        ("mix,c4:0.3", {**dict.fromkeys(KINDS, 0.1), "c4": 0.3}),
        ("c4:0.5,ptb,alpaca", {"c4": 0.5, "ptb": 0.25, "alpaca": 0.25}),
        ("wikitext2:validation", {"wikitext2:validation": 1}),
        ("boolq-passages:0.6,answers:alpaca:0.4", {"boolq-passages": 0.6, "answers:alpaca": 0.4}),
        ("c4,ptb", {"c4": 0.5, "ptb": 0.5}),
        ("c4:1, ptb:3", {"c4": 0.25, "ptb": 0.75}),
        ("c4:.5,ptb:0", {"c4": 1}),
        (
            "wikitext2:validation:30,hf:owner/name:20,ptb@report:50",
            {"wikitext2:validation": 0.3, "hf:owner/name": 0.2, "ptb@report": 0.5},
        ),
        ("hf:owner/name:a:test:text:1,c4:1", {"hf:owner/name:a:test:text": 0.5, "c4": 0.5}),
    ],
)
def test_a_share_is_the_number_after_the_last_colon(text, expected):
    assert {part.name: part.share for part in parse_blend(text)} == pytest.approx(expected)


def test_paths_may_have_colons_and_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:a.txt", r"D:\data\a.txt", "a,b.txt", "c.jsonl"):
        Path(name).write_text("w1")
    assert [part.name for part in parse_blend("C:a.txt:0.5,c.jsonl:text:0.5")] == ["C:a.txt", "c.jsonl:text"]
    assert [part.name for part in parse_blend("a,b.txt")] == ["a,b.txt"]
    for blend in (r"D:\data\a.txt", r"D:\data\a.txt:0.5,mix:0.5"):
        assert parse_blend(blend)[0].name == r"D:\data\a.txt"
    here = tmp_path.absolute()
    assert absolute_blend("mix:0.5,C:a.txt:1,answers:c.jsonl:2") == (
        f"mix:0.5,{here}/C:a.txt:1,answers:{here}/c.jsonl:2"
    )
    of_part = absolute_blend("mix:0.5,C:a.txt:1,c.jsonl@report:2", "calibration")
    assert of_part == f"mix:0.5,{here}/C:a.txt@calibration:1,{here}/c.jsonl@report:2"
    assert [part.source.part for part in parse_blend(of_part) if part.source] == ["calibration", "report"]
    (with_comma,) = parse_blend(absolute_blend("a,b.txt", "calibration"))
    assert with_comma.name == f"{here}/a,b.txt@calibration"
    Path("d.txt").write_text("w1")
    Path("d.txt:2").write_text("w1")
    with pytest.raises(AdaPrunerError, match=r"'d.txt:2' is a file, and 'd.txt' too"):
        parse_blend("d.txt:2,c4:1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no dataset"),
        (":0.5,c4:0.5", "names no dataset"),
        ("c4:2", "needs no share: remove :2; if that is part of the name, write c4:2:1"),
        ("c4:1,ptb", "the shares .* are 1: .*, and they must leave something to datasets without a share"),
        ("c4:0,ptb:0", "the shares .* are 0, 0: none may be negative, one must be more than 0"),
        ("c4:-1,ptb:2", "the shares .* are -1, 2"),
        ("c4:1,ptb:1,c4:1", "'c4' is named twice"),
        ("c4:0.5,alpac:0.5", "unknown text source 'alpac'.* Did you mean 'alpaca'"),
        ("c4:nan,ptb:1", "must leave something"),
        ("answers:mix", "has answers already"),
        ("mix,notes.txt:30%", "notes.txt has no columns; a share is a number such as 0.5"),
        ("answers:", "unknown text source"),
        ("mix@report", "unknown text source 'mix@report'|has no parts|is text that the model writes"),
    ],
)
def test_unclear_blends_are_refused(text, message, model_folder, tmp_path, capsys):
    assert exit_code(["recover", str(model_folder), "--data", text, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not RecoveryFolder(tmp_path / "out").unfinished.parent.exists()


@pytest.mark.parametrize(("given", "tokens"), [("2M", 2_000_000), ("300k", 300_000), ("1_000_000", 10**6), (5, 5)])
def test_numbers_of_tokens(given, tokens):
    assert RecoveryOptions(tokens=given).tokens == str(tokens)


def test_every_batch_has_the_shares_and_short_datasets_are_repeated():
    blend = [dataset("a", 500, 0.3), dataset("b", 7, 0.2), dataset("c", 900, 0.5)]
    places = {id(example): name.name for name in blend for example in name.training}
    mixed = MixedExamples(blend, 10_000, seed=3)
    names = [places[id(mixed[position])] for position in range(10_000)]
    for first in range(0, 10_000, 10):
        counts = Counter(names[first : first + 10])
        assert all(abs(counts[name] - expected) <= 1 for name, expected in (("a", 3), ("b", 2), ("c", 5)))
    assert mixed.learnt(10_000) == [names.count(name) for name in "abc"] == pytest.approx([3000, 2000, 5000], abs=2)
    assert mixed.learnt(4321) == [names[:4321].count(name) for name in "abc"]
    learnt = [mixed[position]["input_ids"][0] for position in range(10_000) if names[position] == "b"]
    passes = [learnt[first : first + 7] for first in range(0, len(learnt) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(map(tuple, passes))) > 100
    again, other = MixedExamples(blend, 10_000, seed=3), MixedExamples(blend, 10_000, seed=4)
    assert [again[position] for position in range(99)] == [mixed[position] for position in range(99)]
    assert [other[position] for position in range(99)] != [mixed[position] for position in range(99)]


def test_the_length_of_a_training():
    blend = [dataset("a", 30, 0.75, tokens=8), dataset("b", 10, 0.25, tokens=16)]
    steps = partial(total_steps, blend)
    # Ten tokens per example on average.
    assert steps(RecoveryOptions(tokens="2k", batch_size=4)) == 50
    assert steps(RecoveryOptions(tokens=1, batch_size=4)) == 1
    assert steps(RecoveryOptions(batch_size=3)) == 27
    assert steps(RecoveryOptions(epochs=1, batch_size=3)) == 14
    assert steps(RecoveryOptions(steps=5)) == 5


def test_validation_reads_a_fiftieth_of_the_examples_five_times():
    for options, examples, expected in [
        ({"steps": 1000, "batch_size": 8}, 10**6, 160),
        ({"steps": 100, "batch_size": 8}, 10**6, 16),
        ({"epochs": 2, "batch_size": 100}, 10_000, 400),
        ({"tokens": "1M", "seq_len": 100}, 10**6, 200),
        # Every 200 steps: twice as often.
        ({"steps": 2000, "batch_size": 8}, 10**6, 160),
        ({"steps": 1000, "batch_size": 8, "validation": 20}, 10**6, 20),
    ]:
        assert most_held_out(RecoveryOptions(**options), examples) == expected


def test_no_more_is_tokenized_than_the_training_needs(tmp_path, tokenizer, instructions, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"w{number % 90} " * 20 for number in range(5000)))
    seen = []
    original = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, text: str, *arguments: Any, **named: Any) -> Any:
        seen.append(len(text))
        return original(self, text, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    windows = text_windows(parse_source(str(path)), tokenizer, 16, limit=100)
    assert 100 <= len(windows) < 1000
    assert sum(seen) < 0.1 * path.stat().st_size
    # From the beginning to the end.
    assert len(windows[:, 3].unique()) > 30
    assert len(text_windows(parse_source(str(path)), tokenizer, 16)) == len(
        text_windows(parse_source(str(path)), tokenizer, 16, limit=10**6)
    )
    seen.clear()
    options = RecoveryOptions(seq_len=256, steps=2, batch_size=5)
    [made] = read_examples(parse_blend(str(instructions)), tokenizer, options, 0.5)
    assert isinstance(made, Examples)
    # Ten for the training, and at most as many for validation as the tenth of all.
    assert 12 <= len(made.training) + len(made.validation) <= 28
    assert len(seen) == 2 * (len(made.training) + len(made.validation))


def test_the_weight_of_the_labels(tokenizer, model, instructions, text_file):
    blend = parse_blend(f"{text_file}:1,answers:{instructions}:1,{instructions}:1,mix:0.1")[:4]
    options = RecoveryOptions(seq_len=128, records=8)
    for label_weight, expected in ((0.4, [0.4, 0, 0.4, 0]), (1.0, [1, 0, 1, 0])):
        weights = []
        for part in read_examples(blend, tokenizer, options, label_weight):
            if isinstance(part, Unwritten):
                assert part.count == 8
                part = part.examples(part.write(model, tokenizer, 128, 0), options)
            assert len(part.training) + len(part.validation) == 8
            weights.append({example["label_weight"] for example in [*part.training, *part.validation]})
            assert collate(list(part.training))["label_weight"].tolist() == pytest.approx(
                [*weights[-1]] * len(part.training)
            )
        assert weights == [{weight} for weight in expected]


def test_every_kind_of_mix_has_an_example_to_validate(tokenizer, text_file):
    for part in read_examples(parse_blend(f"mix:0.001,{text_file}:0.999"), tokenizer, RecoveryOptions(seq_len=16), 0.0):
        assert not isinstance(part, Unwritten) or part.count == 2


def test_the_teacher_answers_prompts(tokenizer, model, instructions, monkeypatch):
    [part] = read_examples(
        parse_blend(f"answers:{instructions}"), tokenizer, RecoveryOptions(seq_len=96, records=20), 0.5
    )
    assert isinstance(part, Unwritten)
    texts = [tokenizer.decode(prompt) for prompt in part.prompts]
    assert len(texts) == 20
    written = part.write(model, tokenizer, 96, seed=5)
    assert written.equal(part.write(model, tokenizer, 96, seed=5))
    made = part.examples(written, RecoveryOptions(seq_len=96))
    for example, prompt in zip([*made.training, *made.validation], part.prompts, strict=True):
        assert example["input_ids"][: len(prompt)] == prompt
        learnt = [label for label in example["labels"] if label != -100]
        assert example["input_ids"][len(prompt) :] == learnt
        # An answer has as many tokens as fit, or its end token.
        assert len(example["input_ids"]) >= 90 or learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in learnt[:-1]
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}w50 {{ m['content'] }} w51{% endfor %}")
    [chat] = read_examples(
        parse_blend(f"answers:{instructions}"), tokenizer, RecoveryOptions(seq_len=96, records=20), 0.5
    )
    assert isinstance(chat, Unwritten)
    assert all(re.fullmatch(r"w50 w\d+ w2 w51", tokenizer.decode(prompt)) for prompt in chat.prompts)


def test_prompts_beyond_the_positions_are_refused_before_the_teacher_is_loaded(
    model_folder, instructions, tmp_path, monkeypatch
):
    monkeypatch.setattr("adapruner.run.recover._load_teacher", None)
    teacher = tmp_path / "teacher"
    shutil.copytree(model_folder, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3}))
    with pytest.raises(AdaPrunerError, match=r"a prompt of \d+ tokens does not fit the 3 positions of this llama"):
        adapruner.recover(
            model_folder, f"answers:{instructions}", tmp_path / "a", teacher=str(teacher), **SHORT | {"seq_len": 96}
        )


def test_a_blend_is_learnt(model_folder, text_file, instructions, tmp_path):
    record = adapruner.recover(
        model_folder,
        f"mix:0.25,{text_file}:0.5,{instructions}:0.25",
        tmp_path / "a",
        teacher=str(model_folder),
        **SHORT | {"tokens": "3k", "seq_len": 64, "records": 12},
    )
    assert record.method == "distillation"
    assert list(record.parts) == [*KINDS, str(text_file), str(instructions)]
    shares = {name: part.learnt / (record.steps * 4) for name, part in record.parts.items()}
    assert [*shares.values()] == pytest.approx([*[0.25 / 7] * 7, 0.5, 0.25], abs=0.03)
    assert record.tokens == sum(part.tokens for part in record.parts.values()) == pytest.approx(3000, rel=0.1)
    for part in record.parts.values():
        assert part.examples <= 11
        assert part.passes == pytest.approx(part.learnt / part.examples, abs=0.01)
    names = f"`prose`, `{text_file.name}`, `answers:{instructions.name}`"
    renamed = {"prose": 0, str(text_file): 0, f"answers:{instructions}": 0}
    assert f"It was fine-tuned on {names}: " in trained_sentence(record.model_copy(update={"parts": renamed}))
    origin = json.loads((tmp_path / "a/adapruner.json").read_text())
    assert [text["text"] for text in origin["texts"]][-2:] == [text_file.name, instructions.name]


def test_what_the_teacher_writes_needs_one(model_folder, instructions, tmp_path):
    for data in ("mix:0.5,c4:0.5", f"answers:{instructions}"):
        with pytest.raises(AdaPrunerError, match="is text that the dense model writes: name it with `teacher`"):
            adapruner.recover(model_folder, data, tmp_path / "a", **SHORT)

"""Perplexity against the loss that transformers computes."""

import contextlib
import copy
import hashlib
import json
import math
import re
import shutil
import statistics
from typing import Any, get_args

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError
from adapruner.calibration import _probes
from adapruner.calibration._probes import Question, probe_texts, prompts, questions
from adapruner.cli import app
from adapruner.cli._output import print_output
from adapruner.config import PruneConfig
from adapruner.evaluation import _breakage, _losses, _writing
from adapruner.evaluation._breakage import Breakage, Writing, measure_breakage
from adapruner.evaluation._losses import finite_windows, may_overflow, window_losses
from adapruner.evaluation._perplexity import Perplexity, measure_perplexity
from adapruner.evaluation._speed import count_macs, measure_speed
from adapruner.evaluation._verdict import Verdict, judge
from adapruner.evaluation._writing import write
from adapruner.memory import Placement
from adapruner.models._layers import is_streamed
from adapruner.models._loading import load_model
from adapruner.models._places import find_model
from adapruner.structure._build import build_structure
from adapruner.texts import assign_texts
from adapruner.verbs import _evaluate, _source
from adapruner.verbs._source import ModelSource
from test_generation import SETTINGS, continued_alone
from tiny_families import cut_to

TWO_DEVICES = (torch.device("cuda:0"), torch.device("cuda:1"))


def test_equals_the_loss_of_transformers(model, monkeypatch):
    windows = torch.randint(3, 96, (7, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(_losses, "_TOKENS_PER_BATCH_ON_CPU", 36)
    with torch.no_grad():
        expected = [float(model(window[None], labels=window[None]).loss) for window in windows]
    torch.testing.assert_close(window_losses(model, windows), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    steps: list[int] = []
    result = measure_perplexity(model, windows, "text", steps.append)
    assert math.isclose(result.perplexity, math.exp(sum(expected) / 7), rel_tol=1e-5)
    assert result.loss_standard_error == pytest.approx(statistics.stdev(expected) / math.sqrt(7), rel=1e-4)
    assert steps == [3, 3, 1]


@pytest.fixture
def _continuations_are_long(monkeypatch):
    """Long enough to repeat themselves."""
    monkeypatch.setattr(_writing, "_CONTINUED", 24)


def ask(monkeypatch: pytest.MonkeyPatch, *prompts: str) -> None:
    """Makes models continue these words instead of the built-in prompts."""
    asked = {"openings": {prompt: [int(word[1:]) + 4 for word in prompt.split()] for prompt in prompts}}
    for module in (_writing, _breakage):
        monkeypatch.setattr(module, "prompts", lambda _: asked)


@pytest.mark.usefixtures("_continuations_are_long")
def test_text_is_written_without_the_settings_and_the_random_state_of_others(model, tokenizer, monkeypatch):
    ask(monkeypatch, "w7 w8 w9", "w11")
    state, expected = torch.get_rng_state(), write(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*expected.values())
    for name in SETTINGS.keys() - {"eos_token_id"}:
        setattr(model.generation_config, name, SETTINGS[name])
    torch.manual_seed(5)
    again = write(model, tokenizer)
    assert model.generation_config.num_beams == 2
    assert {way: tokens.tolist() for way, tokens in again.items()} == {
        way: tokens.tolist() for way, tokens in expected.items()
    }


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_nothing_is_written_or_read_past_the_last_position(family, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(_writing, "_CONTINUED", 128)
    model = make_model(family)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for prompt, longest in (("w7 w8", 2), (" ".join(["w5 w6 w7"] * 20), 32)):
        ask(monkeypatch, prompt)
        [text] = _writing.texts_of(write(model, tokenizer)["openings, greedy"])
        assert len(text.prompt) == longest
        assert text.continuation == continued_alone(model, text.prompt, 64 - longest)
    question = Question(" ".join(["w5"] * 80), ["w6", "w7"])
    assert _breakage.share_answered(model, tokenizer, [question]) in (0, 1)


def test_a_model_with_a_chat_template_is_asked(tokenizer):
    assert [*prompts(tokenizer)] == ["openings"]
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}w7 {{ m.content }} w8{% endfor %}{% if add_generation_prompt %} w9{% endif %}"
    )
    openings, questions = prompts(chat).values()
    assert (len(openings), len(questions)) == (16, 32)
    assert all((tokens[0], *tokens[-2:]) == (11, 12, 13) for tokens in questions.values())
    assert all(question[-1] in "?." for question in questions)
    chat.chat_template = "{{ raise_exception('a system prompt is needed') }}"
    assert [*prompts(chat)] == ["openings"]


def test_signs_of_writing_computed_by_hand(model, tokenizer, monkeypatch):
    ask(monkeypatch, "w1", "w2", "w3")
    rows = [
        [5, 6, 5, 6, 5, 6, 5, 6],  # 5656 6565 5656 6565 5656: three of five were there before
        [6, 5, 6, 5, 9, 2, -1, -1],  # 6565 5659 6592: the first one is in the first text too
        [8, 2, -1, -1, -1, -1, -1, -1],  # no piece
    ]
    written = {"openings, sampled": torch.tensor([[prompt, *row] for prompt, row in zip((5, 6, 7), rows, strict=True)])}
    [signs] = _breakage.judge_writing(tokenizer, written, [2], model).values()
    assert signs.repetition == pytest.approx((3 / 5 + 0) / 2)
    assert signs.distinct == pytest.approx(4 / 8)
    assert signs.ended == pytest.approx(2 / 3)
    assert signs.texts == {"w1": "w1 w2 w1 w2 w1 w2 w1 w2", "w2": "w2 w1 w2 w1 w5", "w3": "w4"}
    losses = []
    for prompt, row in zip((5, 6, 7), rows, strict=True):
        tokens = torch.tensor([[prompt, *(token for token in row if token >= 0)]])
        with torch.no_grad():
            losses += [float(model(tokens, labels=tokens).loss)] * (tokens.shape[1] - 1)
    assert signs.loss_of_dense == pytest.approx(statistics.fmean(losses), rel=1e-5)
    of_others = _breakage.judge_writing(tokenizer, written, [2], None)
    greedy = _breakage.judge_writing(tokenizer, {"openings, greedy": written["openings, sampled"]}, [2], model)
    expected = [signs.model_copy(update={"loss_of_dense": None})]
    assert [*of_others.values()] == [*greedy.values()] == expected


@pytest.mark.usefixtures("_continuations_are_long")
def test_agreement_is_the_fraction_of_equal_next_tokens(make_model, model, tokenizer, monkeypatch):
    """Along the text of the one, whatever the other would have written before."""
    ask(monkeypatch, "w7 w8 w9", "w20 w3 w4 w5")
    monkeypatch.setattr(_breakage, "questions", lambda: [Question("w1", ["w2", "w3"])])
    written = write(model, tokenizer)
    other = make_model("qwen2")
    agreed = [measure_breakage(judged, tokenizer, {}, {}, written).agreement for judged in (model, other)]
    equal = []
    for prompt, continuation in _writing.texts_of(written["openings, greedy"]):
        for place, token in enumerate(continuation):
            with torch.no_grad():
                logits = other(torch.tensor([[*prompt, *continuation[:place]]])).logits[0, -1]
            equal.append(int(logits.argmax()) == token)
    assert agreed == [1, statistics.fmean(equal)]


def test_questions_are_answered_by_the_likelihood_of_each_choice(model, tokenizer):
    generator = torch.Generator().manual_seed(3)
    draw = lambda count: " ".join(f"w{word}" for word in torch.randint(92, (count,), generator=generator).tolist())  # noqa: E731
    asked = [Question(draw(3), [draw(1 + number % 3) for number in range(4)]) for _ in range(25)]
    right = 0
    for question, choices in asked:
        likelihoods = []
        for choice in choices:
            before = tokenizer(f"Question: {question}\nAnswer:").input_ids
            likelihoods.append(0.0)
            for token in tokenizer(choice).input_ids:
                with torch.no_grad():
                    likelihoods[-1] += float(model(torch.tensor([before])).logits[0, -1].log_softmax(-1)[token])
                before = [*before, token]
        right += max(likelihoods) == likelihoods[0]
    assert 0 < right < 25
    assert _breakage.share_answered(model, tokenizer, asked) == right / 25
    # A model that tells nothing apart knows nothing.
    assert _breakage.share_answered(model, tokenizer, [Question("w1", ["w2", "w2"])]) == 0


def test_built_in_questions_have_a_right_answer_and_others():
    asked = questions()
    assert len({question for question, _ in asked}) == 100
    assert all(2 <= len(choices) == len(set(choices)) <= 4 for _, choices in asked)


def test_two_models_are_compared_as_in_a_run(finished, model, model_folder, tokenizer, capsys):
    def without_texts(breakage: Breakage | None) -> dict[str, Any]:
        assert breakage
        assert len(breakage.texts) == 5  # in windows of the run's length there
        return breakage.model_dump(exclude={"texts"})

    result, run = adapruner.evaluate(finished.model_folder, against=model_folder), finished.result
    assert (result.perplexity, result.tasks) == ([], [])
    assert without_texts(result.dense) == without_texts(run.model("dense").breakage)
    assert without_texts(result.breakage) == without_texts(run.model("searched").breakage)
    assert adapruner.evaluate(model, against=model, tokenizer=tokenizer).verdict == "usable"
    arguments = ["evaluate", str(finished.model_folder), "--against", str(model_folder)]
    app([*arguments, "--json"], exit_on_error=False, result_action="return_value")
    content = json.loads(capsys.readouterr().out)
    assert content["breakage"] == json.loads(json.dumps(result.breakage.model_dump(mode="json")))
    assert content["verdict"] == result.verdict
    app(arguments, exit_on_error=False, result_action="return_value")
    assert result.verdict in capsys.readouterr().out


def test_of_models_with_other_tokens_only_what_compares_is_measured(model, model_folder, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zzz"])
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    result = adapruner.evaluate(tmp_path / "other", against=model_folder)
    assert result.breakage
    assert result.dense
    assert (result.dense.agreement, result.breakage.agreement) == (1, None)
    assert result.dense.writing["openings, sampled"].loss_of_dense
    assert {signs.loss_of_dense for signs in result.breakage.writing.values()} == {None}
    by_layer = adapruner.evaluate(model_folder, against=model_folder, layer_wise=True)
    assert by_layer.breakage
    assert (by_layer.breakage.writing, by_layer.breakage.answered, by_layer.verdict) == ({}, None, "usable")


@pytest.mark.parametrize("is_dense", [True, False])
def test_the_texts_fit_a_model_with_fewer_positions(is_dense, model, model_folder, tokenizer, tmp_path):
    """Than the texts that the other one writes have."""
    shorter = copy.deepcopy(model)
    shorter.config.max_position_embeddings = 4
    shorter.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    models = (model_folder, tmp_path) if is_dense else (tmp_path, model_folder)
    result = adapruner.evaluate(models[0], against=models[1])
    assert result.breakage
    assert result.dense
    assert result.breakage.agreement == 1
    losses = [{name: text.perplexity for name, text in it.texts.items()} for it in (result.dense, result.breakage)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("formal", "language", "repeated", "expected"),
    [
        (1.279, 1.099, 0.299, "usable"),
        (1.281, 1.0, 0.2, "recover first"),
        (1.0, 1.101, 0.2, "recover first"),
        (1.0, 1.0, 0.301, "recover first"),
        (1.799, 1.209, 1.0, "recover first"),
        (1.0, 1.211, 1.0, "broken"),
        (1.801, 1.0, 0.2, "broken"),
        (math.nan, 1.0, 0.2, "broken"),
        (1.279, 1.099, None, "usable"),  # nothing is written where every token would read all weights
        (1.801, 1.0, None, "broken"),
        (None, None, 0.2, "usable"),  # a tokenizer that does not say which bytes a token is
    ],
)
def test_verdict_at_its_limits(model, formal, language, repeated, expected):
    number = measure_perplexity(model, torch.randint(3, 96, (2, 12)), "text")

    def text(bits: float | None) -> Perplexity:
        counted = None if bits is None else number.predicted_tokens
        return number.model_copy(update={"perplexity": 2.0 ** (bits or 1.0), "predicted_bytes": counted})

    def signs(repeated: float | None, **bits: float | None) -> Breakage:
        writing = Writing(repetition=repeated or 0.0, distinct=1.0, ended=0.0, loss_of_dense=1.0, texts={})
        ways = {} if repeated is None else {"openings, greedy": writing}
        # Agreement with the dense model says nothing of one that learnt something else.
        return Breakage(writing=ways, agreement=0.1, texts={name: text(value) for name, value in bits.items()})

    # The mean of the kinds counts: twice the bits of the dense model for one, half of them for the other.
    dense = signs(0.2, arithmetic=1.0, code=8.0, prose=1.0, dialogue=8.0, instructions=3.0)
    pruned = signs(
        repeated,
        arithmetic=formal and 2 * formal,
        code=formal and 4 * formal,
        prose=language and 2 * language,
        dialogue=language and 4 * language,
        instructions=language and 3 * language,
    )
    assert judge(dense, pruned) == expected
    assert judge(dense, dense) == "usable"


@pytest.mark.parametrize(("loss", "expected"), [(1.69, "usable"), (1.71, "recover first"), (9.0, "recover first")])
def test_verdict_on_text_that_the_dense_model_would_not_write(loss, expected):
    def signs(loss: float) -> Breakage:
        writing = Writing(repetition=0.1, distinct=1.0, ended=0.0, loss_of_dense=loss, texts={})
        return Breakage(texts={}, writing={"openings, sampled": writing})

    assert judge(signs(1.4), signs(loss)) == expected


def test_built_in_texts_are_the_same_everywhere(tokenizer):
    """They need no dataset, and nothing of the Python that runs."""
    texts = probe_texts(tokenizer, 32)
    assert {name: (*text.windows.shape,) for name, text in texts.items()} == {
        "arithmetic": (24, 32),
        "code": (24, 32),
        "prose": (22, 32),
        "dialogue": (24, 32),
        "instructions": (21, 32),
    }
    assert all(text.predicted_bytes for text in texts.values())
    assert {
        name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in _probes.built_in_texts().items()
    } == {
        "arithmetic": "f6965518880b",
        "code": "55cec43a2237",
        "prose": "78f19e7c2a51",
        "dialogue": "e85fe13dcbb7",
        "instructions": "ad0c0fa02812",
    }
    lines = re.findall(r"(\d+) ([+x]) (\d+) = (\d+)", _probes.built_in_texts()["arithmetic"])
    assert len(lines) > 400
    assert all(int(c) == (int(a) + int(b) if sign == "+" else int(a) * int(b)) for a, sign, b, c in lines)


def test_windows_without_a_finite_loss_are_left_out(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.inf
    windows = torch.randint(8, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    broken = windows.clone()
    broken[[1, 4], 3] = 7
    kept, note = finite_windows(model, {"pool": broken, "objective": windows}, {"pool": 4, "objective": 1})
    assert kept == {"pool": [0, 2, 3, 5], "objective": [*range(6)]}
    assert note == "left out, because the loss of the model on them is not finite: windows [1, 4] of the pool"
    assert finite_windows(model, {"pool": windows}, {"pool": 6})[1] == ""
    with pytest.raises(AdaPrunerError, match=r"not finite on 2 of the 6 windows of the pool.*`dtype` float32"):
        finite_windows(model, {"pool": broken}, {"pool": 5})
    broken[[0, 2], 3] = 7
    with pytest.raises(AdaPrunerError, match="not finite on 4 of the 6 windows of the compensation"):
        finite_windows(model, {"compensation": broken}, {"compensation": 2})


def test_text_is_tried_where_numbers_may_overflow(model):
    assert not may_overflow(model)
    assert may_overflow(copy.deepcopy(model).half())
    for value in (math.nan, -math.inf, 1e20):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[2, 3] = value
        assert may_overflow(other)


def test_the_protocol_is_said_with_the_provenance(model):
    windows, provenance = torch.full((3, 10), 5), {"data_set": "b", "revision": "c"}
    line = "wikitext2: 3 windows of 10 tokens without overlap, mean over 27 predicted tokens"
    assert measure_perplexity(model, windows, "wikitext2").protocol == line
    result = measure_perplexity(model, windows, "wikitext2", provenance=provenance)
    assert result.protocol == f"{line} (data set b, revision c)"
    content = result.model_dump(mode="json")
    assert (content["predicted_tokens"], content["provenance"]) == (27, provenance)


def test_special_tokens_in_front_are_not_predicted(model):
    windows = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    windows[:, :2] = torch.tensor([1, 2])
    result = measure_perplexity(model, windows, "text", stride=10, special_tokens=2)
    with torch.no_grad():
        logits = model(windows).logits[:, 1:-1].log_softmax(-1)
    losses = -logits.gather(-1, windows[:, 2:, None]).squeeze(-1)
    assert result.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert result.loss_standard_error == pytest.approx(float(losses.mean(1).std() / 3**0.5), rel=1e-4)
    assert result.predicted_tokens == 30
    assert "3 windows of 12 tokens without overlap" in result.protocol


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_overlapping_windows_predict_every_token_once(model, stride):
    tokens = torch.randint(3, 96, (12 + 6 * stride,), generator=torch.Generator().manual_seed(0))
    expected = []
    with torch.no_grad():
        for target in range(1, len(tokens)):
            # The window whose last `stride` tokens hold the target, or the first one.
            step = max(0, math.ceil((target - 11) / stride))
            given = tokens[step * stride : target]
            expected.append(-float(model(given[None]).logits[0, -1].log_softmax(-1)[tokens[target]]))
    windows = tokens.unfold(0, 12, stride)
    result = measure_perplexity(model, windows, "text", stride=stride)
    assert result.predicted_tokens == len(expected)
    assert math.isclose(result.perplexity, math.exp(sum(expected) / len(expected)), rel_tol=1e-4)
    assert f"windows of 12 tokens every {stride} tokens" in result.protocol


def test_a_loss_too_large_for_a_perplexity_is_infinite_in_json_too(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    windows = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    assert window_losses(model, windows).mean() > 709.8
    result = measure_perplexity(model, windows, "a")
    assert json.loads(json.dumps(result.model_dump(mode="json")))["perplexity"] == math.inf
    content = json.loads(result.model_dump_json())
    assert (content["perplexity"], content["predicted_tokens"]) == (math.inf, 33)
    assert content["protocol"] == result.protocol
    assert Perplexity.model_validate_json(result.model_dump_json()) == result


def test_what_is_printed_as_json_has_no_infinity(capsys):
    infinite = Perplexity(perplexity=math.inf, text="t", seq_len=9, windows=1, stride=9, predicted_bytes=8)
    print_output({"texts": [infinite], "loss": math.nan, "ratio": 0.5}, True, [])
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    [text] = shown["texts"]
    assert text["perplexity"] is text["bits_per_byte"] is shown["loss"] is None
    assert text["perplexity_missing"] == "too large for a number"
    assert shown["loss_missing"] == "not a number"
    assert (text["windows"], shown["ratio"]) == (1, 0.5)


def cut_some_channels(model: PreTrainedModel) -> PreTrainedModel:
    return cut_to(model, lambda block: 7 if (block.layer, block.kind) == (1, "channels") else block.groups)


@pytest.mark.parametrize("cut", [False, True])
def test_multiplications_are_those_of_the_matrices_and_of_attention(model, cut):
    counted = cut_some_channels(model) if cut else model
    layers = counted.base_model.layers
    matrices = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))
    head = counted.get_output_embeddings().weight.numel()
    prompt, generated = count_macs(counted, 16)
    # Queries with keys and probabilities with values: 6 heads of 8, each over all 16 tokens of the prompt, or 17.
    # Before 5.19, transformers multiplies the 4 frequencies and the positions as matrices.
    rotary = 4 if Version(transformers.__version__) < Version("5.19") else 0
    assert prompt == matrices + len(layers) * 2 * 6 * 8 * 16 + head // 16 + rotary
    assert generated == matrices + len(layers) * 2 * 6 * 8 * 17 + head + rotary


def test_models_are_measured_in_turn(model):
    steps: list[int] = []
    speeds = measure_speed({"dense": model, "cut": cut_some_channels(model)}, (1, 2), 8, 3, 3, steps.append)
    assert len(steps) == 2 * (2 * 4 + 1)
    assert speeds["dense"].parameters - speeds["cut"].parameters == 17 * (3 * 48 + 2)
    assert speeds["cut"].weight_bytes == 4 * speeds["cut"].parameters
    assert speeds["cut"].prompt_macs < speeds["dense"].prompt_macs
    assert (speeds["dense"].unfriendly_widths, speeds["cut"].unfriendly_widths) == ({}, {1: 7})
    for speed in speeds.values():
        for rates in (speed.prefill, speed.decode):
            assert list(rates) == [1, 2]
            assert all(0 < rate.least <= rate.median <= rate.greatest for rate in rates.values())


def test_a_model_that_cannot_be_pruned_has_a_speed(make_model):
    other = make_model("stablelm", qk_layernorm=True)
    with pytest.raises(AdaPrunerError, match="cannot be pruned"):
        build_structure(other)
    [speed] = measure_speed({"stablelm": other}, (1,), 8, 2, 1).values()
    assert (speed.parameters, speed.unfriendly_widths) == (other.num_parameters(), {})
    assert speed.prompt_macs > 0


def test_mapped_weights_count_once_at_one_batch_size(make_model, tmp_path):
    """94 MB that come from the file into memory as they are first used."""
    small = make_model("llama", hidden_size=480, num_hidden_layers=2)
    config = type(small.config).from_dict(small.config.to_dict() | {"intermediate_size": 8192})
    type(small)(config).save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)), device="cpu")
    [speed] = measure_speed({"large": loaded}, (1,), 8, 2, 1).values()
    assert speed.weight_bytes > 90e6
    if speed.peak_memory_bytes is not None:
        assert speed.peak_memory_bytes < 1.5 * speed.weight_bytes


def test_the_command_warns_of_unfriendly_widths(model, model_folder, tmp_path, capsys):
    cut_some_channels(model).save_pretrained(tmp_path / "cut")
    options = f"--against {model_folder} --batch-size 1 --prompt 8 --new-tokens 2 --repetitions 1 --json".split()
    app(["benchmark", str(tmp_path / "cut"), *options], exit_on_error=False, result_action="return_value")
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)) == [str(model_folder), str(tmp_path / "cut")]
    assert "widths of layers 1 are no multiples of 8" in captured.err
    with pytest.raises(AdaPrunerError, match="at least 1"):
        adapruner.benchmark(model_folder, batch_sizes=(0,))


def test_several_models_are_one_table(model, model_folder, text_file, tmp_path, tokenizer, capsys, monkeypatch):
    dense, cut = str(model_folder), str(tmp_path / "cut")
    cut_some_channels(model).save_pretrained(cut)
    tokenizer.save_pretrained(cut)
    command = ["evaluate", dense, cut, "--evaluate", str(text_file), "--seq-len", "16", "--limit", "4"]
    app([*command, "--against", dense, "--json"], exit_on_error=False, result_action="return_value")
    of_dense, of_cut = json.loads(capsys.readouterr().out)
    app([*command[:1], cut, *command[3:], "--json"], exit_on_error=False, result_action="return_value")
    alone = json.loads(capsys.readouterr().out)
    assert (of_dense["model"], of_cut["model"]) == (dense, cut)
    assert of_cut["perplexity"] == alone["perplexity"] != of_dense["perplexity"]
    assert of_dense["speed"]["parameters"] - of_cut["speed"]["parameters"] == 17 * (3 * 48 + 2)
    assert alone["speed"] is of_dense["verdict"] is None  # a model is not compared with itself
    assert of_cut["verdict"] in get_args(Verdict)
    monkeypatch.setenv("COLUMNS", "400")
    app(command, exit_on_error=False, result_action="return_value")
    table = capsys.readouterr().out
    assert all(title in table for title in ("MB", "parameters", "bits per byte", "prompt tokens/s", "new tokens/s"))
    [row] = [line for line in table.splitlines() if cut in line]
    assert f"{of_cut['speed']['parameters']:,}" in row
    monkeypatch.setattr(_source, "open_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(AdaPrunerError, match="nowhere"):
        app([*command[:2], str(tmp_path / "nowhere"), *command[3:]], exit_on_error=False, print_error=False)


def test_a_protocol_says_texts_and_windows(model_folder, tmp_path, monkeypatch):
    words = " ".join(f"w{number % 90}" for number in range(300))
    for name, text in {"wikitext2/wiki.test.raw": f" {words} \n", "ptb/ptb.valid.txt": f" {words} \n" * 2}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("ADAPRUNER_DATA", str(tmp_path))
    # Asked for nothing: the protocol of LLM-Pruner.
    for results in (adapruner.evaluate(model_folder, protocol="llm-pruner"), adapruner.evaluate(model_folder)):
        assert [(one.text, one.seq_len, one.windows) for one in results.perplexity] == [
            ("wikitext2:test", 128, 2),
            ("ptb:validation", 128, 4),
        ]
        assert [one.provenance["split"] for one in results.perplexity] == ["test", "validation"]
        assert results.perplexity[0].provenance["revision"].startswith("sha256 ")
    with pytest.raises(AdaPrunerError, match="wikitext2:test has 300 tokens, less than one window of 2048"):
        adapruner.evaluate(model_folder, protocol="2048")
    with pytest.raises(AdaPrunerError, match="unknown protocol 'wanda'; the protocols are llm-pruner, 2048"):
        adapruner.evaluate(model_folder, protocol="wanda")


@pytest.mark.parametrize("memory_for", ["all weights", "a few layers"])
def test_a_model_that_does_not_fit_is_evaluated_layer_by_layer(
    memory_for, model, model_folder, text_file, capsys, monkeypatch
):
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    total = weights / (0.8 if memory_for == "a few layers" else 0.7)
    monkeypatch.setattr("adapruner.memory.total_and_free", lambda _: (total, total))
    evaluated: list[PreTrainedModel] = []

    def noted(model: PreTrainedModel, *given: Any, **named: Any) -> Perplexity:
        evaluated.append(model)
        return measure_perplexity(model, *given, **named)

    monkeypatch.setattr("adapruner.verbs._evaluate.measure_perplexity", noted)
    scores = []
    for chosen in ([], ["--no-layer-wise"], ["--layer-wise"]):
        command = ["evaluate", str(model_folder), "--evaluate", str(text_file), "--seq-len", "16", "--json"]
        with contextlib.suppress(SystemExit):
            app([*command, *chosen])
        scores.append(json.loads(capsys.readouterr().out)["perplexity"][0]["perplexity"])
    assert [is_streamed(one) for one in evaluated] == [memory_for == "a few layers", False, True]
    assert scores[0] == scores[1] == scores[2]


def test_a_model_in_memory_is_used_as_it_is(model, tokenizer):
    with pytest.raises(AdaPrunerError, match="used as it is: leave `layer_wise` out"):
        adapruner.evaluate(model, {"own": ["w1 w2"]}, seq_len=16, tokenizer=tokenizer, layer_wise=True)


def test_what_a_checkpoint_was_calibrated_on_is_said(model_folder, tmp_path, text_file, capsys):
    texts = assign_texts(PruneConfig(model="m", calibration=str(text_file)))
    folder = shutil.copytree(model_folder, tmp_path / "pruned")
    (folder / "adapruner.json").write_text(json.dumps({"format": 1, "texts": texts.as_records()}))
    copy = shutil.copy(text_file, tmp_path / "copy.txt")
    arguments = ["evaluate", str(folder), "--seq-len", "16", "--limit", "2", "--json"]
    for text, expected in {
        f"{copy}": ["calibrated on text.txt@calibration", "selected on text.txt@objective"],
        f"{text_file}@calibration": ["calibrated on text.txt@calibration"],
        f"{text_file}@report": [],
    }.items():
        app([*arguments, "--evaluate", text], exit_on_error=False, result_action="return_value")
        captured = capsys.readouterr()
        assert json.loads(captured.out)["overlaps"] == [
            f"the perplexity on {text} is optimistic: the checkpoint was {use}, which holds some of the same documents"
            for use in expected
        ]
        assert captured.err.count("advice: the perplexity on") == len(expected)
    (folder / "adapruner.json").write_text(json.dumps({"format": 1, "texts": [{"use": ["pool"]}]}))
    assert adapruner.evaluate(folder, [str(text_file)], seq_len=16, limit=2).overlaps == []
    # One name needs no list.
    assert adapruner.evaluate(folder, str(text_file), seq_len=16, limit=2).perplexity[0].windows == 2


@pytest.mark.parametrize(
    ("is_known", "streamable", "free", "expected"),
    [
        (True, True, 0.8, Placement(TWO_DEVICES, False)),
        (True, False, 0.8, Placement(TWO_DEVICES, False)),
        (True, True, 0.4, Placement(TWO_DEVICES[:1], True)),
        (True, False, 0.4, Placement(TWO_DEVICES, False)),
        (False, False, 0.8, Placement(TWO_DEVICES[:1], False)),
    ],
)
def test_where_a_model_is_evaluated(is_known, streamable, free, expected, model_folder, monkeypatch):
    """On devices that each have memory for a part of the weights."""
    weights = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    monkeypatch.setattr(_evaluate, "resolve_devices", lambda device: TWO_DEVICES[: device.count(",") + 1])
    monkeypatch.setattr(_evaluate, "usable_devices", lambda device: TWO_DEVICES)
    monkeypatch.setattr(_evaluate, "is_streamable", lambda *_: streamable)
    monkeypatch.setattr("adapruner.memory.total_and_free", lambda device: (round(free * weights), 0))
    if not is_known:
        monkeypatch.setattr(_evaluate, "family_named", lambda name: None)
    source = ModelSource.of(model_folder)
    assert _evaluate._placement(source, "auto", "auto", None) == expected
    if not is_known:
        with pytest.raises(AdaPrunerError, match="cannot be spread over several devices"):
            _evaluate._placement(source, "auto", "cuda:0,cuda:1", None)

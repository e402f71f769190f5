"""The training after the cut: a learning rate that is found, what is trained, and where it does not help."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

import adapruner
from adapruner import AdaPrunerError
from adapruner.base.processes import Process
from adapruner.model.loading import empty_model
from adapruner.options import OF_A_SEARCH, PruneConfig, RecoveryOptions
from adapruner.run import choice as chosen, models as nodes
from adapruner.run.memory import healing_within
from adapruner.run.prune import preview
from adapruner.run.recover import read_record
from adapruner.text.windows import Text, joined, load_texts_by_use
from adapruner.train import healing as _healing, loss as _loss
from adapruner.train.healing import heal, healing_options, length_of_windows, read_healing
from adapruner.train.trainer import check_device, frozen, with_adapters
from conftest import write_paragraphs
from run_helpers import QUICK, assert_same_artifacts, flags, run_killed, stages_done

# Of a smaller cut, compensation leaves nothing to bring back. A step has 512 tokens.
OPTIONS: dict[str, Any] = {name: value for name, value in QUICK.items() if name not in ("trials", *OF_A_SEARCH)}
OPTIONS |= {"heal": "20k", "ratio": 0.3}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Long enough that the training reads nothing more than twice."""
    return write_paragraphs(tmp_path_factory.mktemp("texts") / "text.txt", 1600)


@pytest.fixture(scope="module")
def healed(tmp_path_factory, model_folder, text_file):
    output = tmp_path_factory.mktemp("healed") / "run"
    return adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **OPTIONS)


@pytest.fixture(scope="module")
def compensated(healed, tmp_path_factory):
    """The model of the same run without the training."""
    output = tmp_path_factory.mktemp("compensated") / "run"
    return adapruner.prune(from_=healed.output, output=output, heal="none").model_folder


def divergence(model: PreTrainedModel, dense: PreTrainedModel, rows: torch.Tensor) -> float:
    with torch.no_grad():
        predicted, wanted = (one(rows).logits[:, :-1].log_softmax(-1) for one in (model, dense))
        return float((wanted.exp() * (wanted - predicted)).sum(-1).mean())


def test_every_input_of_a_linear_layer_is_scaled(healed, compensated, model_folder):
    before, after = (adapruner.load(folder) for folder in (compensated, healed.model_folder))
    linear = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    for name, weight in after.named_parameters():
        was = before.get_parameter(name)
        assert weight.equal(was) != (name.removesuffix(".weight") in linear), name
        if not weight.equal(was):
            ratios = (weight / was).detach()
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=1e-4)
    rows = torch.randint(4, 60, (32, 16), generator=torch.Generator().manual_seed(0))
    dense = adapruner.load(model_folder)
    assert divergence(after, dense, rows) < divergence(before, dense, rows)


STORED: Any = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@STORED
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of PEFT
def test_small_scales_are_seen_where_bfloat16_is_native(dtype, model_folder, monkeypatch):
    """Of a number in bfloat16, a thousandth more is the same number."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    below = frozen(adapruner.load(model_folder, dtype), "ia3")
    adapted: Any = with_adapters(below, RecoveryOptions(train="ia3", steps=1))
    rows = torch.randint(4, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = adapted(rows).logits
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.001)
        assert not adapted(rows).logits.equal(before)


@STORED
def test_weights_of_linear_layers_alone_are_rounded_below_scales(dtype, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    loaded = adapruner.load(model_folder, dtype)
    below = frozen(loaded, "ia3")
    rounded = {name for name, weight in below.named_parameters() if weight.dtype == torch.bfloat16}
    linear = {f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, nn.Linear)}
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    embedding = set() if dtype == "float32" else {"model.embed_tokens.weight"}
    assert rounded == linear - tied | embedding
    assert below.get_input_embeddings()(torch.tensor([5])).dtype == torch.float32
    assert {weight.dtype for name, weight in below.named_parameters() if name not in rounded} == {torch.float32}
    assert str(loaded.dtype) == f"torch.{dtype}"
    # FSDP rounds what it gathers.
    monkeypatch.setattr("adapruner.train.trainer.this_process", lambda: Process(count=2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (frozen(loaded, "ia3") is loaded) == (dtype != "float16")


def test_what_training_is_judged_on_is_not_fitted(model_folder, text_file, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}
    fit, heal = chosen.measure_moments, nodes.heal
    monkeypatch.setattr(
        chosen, "measure_moments", lambda *args, **named: seen.update(fitted=args[2]) or fit(*args, **named)
    )
    monkeypatch.setattr(nodes, "heal", lambda *args: seen.update(learnt=args[1], judged=args[2]) or heal(*args))
    adapruner.prune(str(model_folder), output=tmp_path / "run", calibration=str(text_file), **OPTIONS)
    fitted, learnt, judged = (
        {*map(tuple, text.tolist())} for text in (seen["fitted"], seen["learnt"].windows, seen["judged"].windows)
    )
    assert judged
    # Training reads further windows of the same text.
    assert fitted < learnt
    assert not learnt & judged


def test_no_text_is_read_more_than_twice(healed, model_folder, text_file, tmp_path, capsys):
    """Whatever is asked for: what is left of the text is drawn first; the run says what it left out."""
    few = write_paragraphs(tmp_path / "few.txt", 100)
    run = tmp_path / "run"
    healing = adapruner.prune(str(model_folder), output=run, calibration=str(few), **OPTIONS).result.healing
    (learnt,) = healing.record.parts.values()
    further = load_texts_by_use(run / "windows-to-heal.safetensors")["healing"].windows
    fitted = load_texts_by_use(run / "windows.safetensors")["compensation"].windows
    assert len({*map(tuple, further.tolist())} - {*map(tuple, fitted.tolist())}) == len(further) > 0
    assert 1 < learnt.passes <= 2
    assert "2 times, and ends before the 19,968 of `heal`" in " ".join(capsys.readouterr().err.split())
    assert healed.result.healing.record.parts[str(text_file)].passes < 2


def test_training_on_the_pool_reads_further_text(healed, model_folder, text_file, tmp_path):
    """A search without second moments trains on its pool, however many windows compensation would have."""
    options = QUICK | {"space": "paper", "compensation": "none", "compensation_windows": 9999, "pool": 40}
    options |= {"ratio": 0.3, "heal": "8k"}
    run = tmp_path / "run"
    healing = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options).result.healing
    texts = load_texts_by_use(run / "windows.safetensors")
    assert texts.keys() == {"pool", "objective"}
    further = load_texts_by_use(run / "windows-to-heal.safetensors")["healing"].windows
    pool = texts["pool"].windows
    assert not {*map(tuple, further.tolist())} & {*map(tuple, pool.tolist())}
    (learnt,) = healing.record.parts.values()
    assert learnt.passes <= 2
    # A tenth of the pool is held out.
    assert (len(pool) - 4 + len(further)) * 2 * options["seq_len"] >= 8000


def test_a_run_without_further_text_ends_earlier(model_folder, tmp_path, capsys):
    few, run = write_paragraphs(tmp_path / "few.txt", 100), tmp_path / "run"
    adapruner.prune(str(model_folder), output=run, calibration=str(few), **OPTIONS | {"compensation_windows": 100})
    assert not load_texts_by_use(run / "windows-to-heal.safetensors")
    assert "reads its 720 tokens of text 2 times" in " ".join(capsys.readouterr().err.split())


def test_windows_are_put_together_into_long_ones():
    """Every token but the special ones once, in its order."""
    windows = torch.cat([torch.tensor([[1]]).expand(10, 1), torch.arange(100, 250).view(10, 15)], 1)
    long = joined(windows, torch.tensor([1]), 64)
    assert [len(window) for window in long] == [64, 64, 25]
    assert [int(window[0]) for window in long] == [1, 1, 1]
    assert torch.cat([window[1:] for window in long]).equal(torch.arange(100, 250))
    # Windows of a user may begin otherwise.
    given = joined(windows[:, 1:], torch.tensor([1]), 64)
    assert torch.cat(given).equal(torch.arange(100, 250))
    assert length_of_windows(128, 384, 2048) == 512
    assert length_of_windows(128, 384, 256) == 256  # of the model
    assert length_of_windows(128, 16, 2048) == 256  # of little text, so that there are several
    assert length_of_windows(2048, 384, None) == 2048


def test_nothing_is_trained_where_nothing_can_be_held_out(model_folder, text_file, tmp_path, capsys):
    options = OPTIONS | {"calibration": str(text_file), "compensation_windows": 2}
    result = adapruner.prune(str(model_folder), output=tmp_path / "run", **options)
    assert result.result.healing is None
    assert "no kind of text has three windows" in capsys.readouterr().err


def test_the_record_says_which_rate_was_best(healed):
    healing = healed.result.healing
    assert healing == read_healing(healed.model_folder)
    assert healing.trained == "ia3"
    best = min(healing.losses_by_rate, key=healing.losses_by_rate.get)
    assert healing.record.config["learning_rate"] == best
    assert healing.record.loss_after < healing.record.loss_before == pytest.approx(healing.loss_before)
    assert healing.record.steps == 39
    assert 0.85 < healing.record.tokens / (39 * 512) <= 1  # the last window of a text is shorter
    card = (healed.model_folder / "README.md").read_text()
    assert f"at a learning rate of {best:g}, the best of 3 tried" in healed.report.read_text()
    assert f"It was trained to predict as the dense model does, on {healing.record.tokens:,} tokens of" in card


def test_a_lowest_rate_that_is_worse_by_chance_hides_no_other(tmp_path, monkeypatch):
    """A few steps at the lowest change little: noise decides if they help."""
    losses, chosen = {3e-4: 1.001, 1e-3: 0.95, 3e-3: 0.97}, list[float]()

    def trained(load: object, blend: object, options: RecoveryOptions, *_: object) -> None:
        chosen.append(options.learning_rate)
        raise InterruptedError

    monkeypatch.setattr(_healing, "try_training", lambda _, __, options, *___: (1.0, losses[options.learning_rate]))
    monkeypatch.setattr(_healing, "train", trained)
    text, options = Text(torch.ones(8, 16, dtype=torch.int64), ("a",) * 8), RecoveryOptions(train="ia3", steps=98)
    with pytest.raises(InterruptedError):
        heal(None, *text.held_out(2), None, options, tmp_path)
    assert chosen == [1e-3]


def test_trials_of_a_short_training_change_the_model(healed, model_folder, text_file, tmp_path):
    """Of five steps, a trial of a tenth would end before its rate is more than zero."""
    run = shutil.copytree(healed.output, tmp_path / "run")
    options = OPTIONS | {"heal": "2560", "overwrite": True}
    healing = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options).result.healing
    assert all(loss != healing.loss_before for loss in healing.losses_by_rate.values())


def test_predictions_are_compared_over_a_sample_of_the_vocabulary(
    healed, model_folder, text_file, tmp_path, monkeypatch
):
    """Of the model that is trained and of the dense one, in trials, training and validation."""
    widths, logits = list[int](), _loss.Predictor.logits

    def seen(*arguments: Any) -> torch.Tensor:
        computed = logits(*arguments)
        widths.append(computed.shape[-1])
        return computed

    monkeypatch.setattr(_loss, "DRAWN_TOKENS", 2)
    monkeypatch.setattr(_loss.Predictor, "logits", seen)
    run = shutil.copytree(healed.output, tmp_path / "run")
    options = OPTIONS | {"heal": "2560", "overwrite": True}
    adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options)
    assert len({*widths}) == 1
    assert 2 < widths[0] < adapruner.load(model_folder).config.vocab_size


def test_a_finished_run_is_complete(healed, model_folder, text_file, tmp_path):
    run = Path(shutil.copytree(healed.output, tmp_path / "run"))
    (run / "report.html").unlink()
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert result.result == healed.result
    assert stages_done(run) == stages_done(healed.output)
    (run / "result.json").unlink()
    again = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert again.result.healing == healed.result.healing


def test_without_it_the_compensated_model_is_saved(healed, compensated, model_folder, text_file, tmp_path):
    run = shutil.copytree(healed.output, tmp_path / "run")
    options = OPTIONS | {"heal": "none", "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options)
    assert result.result.healing is None
    assert "It was not fine-tuned." in (run / "model/README.md").read_text()
    assert "It was not fine-tuned." in (result.model_folder / "README.md").read_text()
    before, after = (adapruner.load(folder).state_dict() for folder in (compensated, run / "model"))
    assert all(after[name].equal(weight) for name, weight in before.items())


def test_a_killed_training_goes_on_and_fits_nothing_twice(healed, model_folder, text_file, tmp_path):
    """A run of its own: what another run has made would be taken over."""
    run = tmp_path / "run"
    arguments = ["prune", str(model_folder), "-o", str(run), "--calibration", str(text_file), *flags(OPTIONS)]
    # After four steps at each of three rates.
    run_killed("transformers.Trainer", "training_step", 25, arguments, tmp_path)
    assert list(run.glob("unfinished/model-*/compensated/model.safetensors"))
    assert list((run / "unfinished").rglob("checkpoint-*/trainer_state.json"))
    assert list((run / "unfinished").rglob("rates.json"))
    adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **OPTIONS)
    assert stages_done(run).count("cutting") == 1
    assert_same_artifacts(run, healed.output)


@pytest.mark.parametrize("rates", [(0.5, 2.0), (1e38,)], ids=["worse", "not finite"])
def test_a_training_that_does_not_help_ends_after_a_few_steps(
    rates, healed, compensated, model_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(_healing._RATES, "ia3", rates)
    monkeypatch.setattr(_healing, "train", lambda *_, **__: pytest.fail("trained"))
    # All but the last step, and what was measured of it, is taken from the run in which it helps.
    output = Path(shutil.copytree(healed.output, tmp_path / "run"))
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "evaluation")
    (output / "report.html").unlink()
    result = adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **OPTIONS)
    before, after = (adapruner.load(folder).state_dict() for folder in (compensated, output / "model"))
    assert all(after[name].equal(weight) for name, weight in before.items())
    assert "The weights are left as they were: after training," in " ".join(capsys.readouterr().err.split())
    assert result.result.healing.record is None
    assert "The weights are as they were compensated" in (output / "report.html").read_text()
    assert "It was not fine-tuned." in (output / "model" / "README.md").read_text()


def test_where_it_is_impossible_it_is_said(model_folder, text_file, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise AdaPrunerError("PEFT cannot")

    monkeypatch.setattr(nodes, "check_adapters", refuse)
    monkeypatch.setattr(
        nodes, "healing_within", lambda *_: healing_options("lora", 6144, 16, 0, torch.device("cpu"), False)
    )
    result = adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **OPTIONS)
    assert "will not be trained after the cut: PEFT cannot" in capsys.readouterr().err
    assert result.result.healing is None
    assert "healing" not in result.result.stages
    # Where it is possible, the same run has other results.
    monkeypatch.undo()
    with pytest.raises(AdaPrunerError, match=r"another healing\): model"):
        adapruner.prune(str(model_folder), output=tmp_path, calibration=str(text_file), **OPTIONS)


def test_a_gpu_that_is_not_trained_on_is_refused_before_the_run(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "check_device", lambda _: check_device(torch.device("cuda:1")))
    run = {"model": str(model_folder), "calibration": str(text_file), "output": tmp_path / "run"}
    with pytest.raises(AdaPrunerError, match="not on cuda:1: set CUDA_VISIBLE_DEVICES=1 and leave `device` out"):
        adapruner.prune(**run, **OPTIONS)
    assert not (tmp_path / "run").exists()
    assert preview(**run, **OPTIONS | {"heal": "none"}).missing


def test_what_is_trained_follows_from_the_memory_of_the_machine(make_model):
    config = adapruner.PruneConfig.from_options(model="m", calibration="mine", heal="1M")
    empty, device = empty_model(make_model().config), torch.device("cpu")
    weights = sum(weight.numel() for weight in empty.parameters())

    def trained(stated: int, by_layer: bool = False) -> str:
        options = healing_within(config, empty, weights, [device], by_layer, stated)
        assert options is not None
        return options.train

    assert trained(2**40) == "layers"
    assert trained(2**40, by_layer=True) == "ia3"
    assert trained(1) == "ia3"
    sizes = sorted({trained(size): size for size in range(10**6, 10**8, 10**5)}.items(), key=lambda pair: pair[1])
    # LoRA of rank 32 has more weights than a layer of this width.
    assert [name for name, _ in sizes] == ["ia3", "layers"]
    few = config.model_copy(update={"heal": "1000"})
    options = healing_within(few, empty, weights, [device], False, 2**40)
    assert options is not None
    assert options.train == "ia3"
    spread = [torch.device("cpu"), torch.device("cpu", 1)]
    on_several = healing_within(config, empty, weights, spread, False, 2**40)
    assert on_several is not None
    assert on_several.train == "ia3"


def test_the_training_of_a_run_goes_on(healed, model_folder, text_file, tmp_path):
    run = Path(shutil.copytree(healed.output, tmp_path / "run"))
    record = adapruner.recover(run)
    assert record == read_record(run / "recovered")
    config = record.config
    of_run = {"train": "ia3", "tokens": "20000", "label_weight": 0.0, "data": f"{text_file}@calibration"}
    assert config.items() >= of_run.items()
    assert config["learning_rate"] == healed.result.healing.record.config["learning_rate"]
    assert config["teacher"] == str(model_folder)
    assert adapruner.recover(run, output=tmp_path / "b", steps=1).steps == 1
    # The learning rate of scales is not that of other weights, and the dense model did not write other text.
    other = adapruner.recover(run, output=tmp_path / "c", steps=1, train="lora").config
    assert (other["learning_rate"], other["batch_size"], other["label_weight"]) == (1e-4, 64, 0.0)
    (tmp_path / "other.txt").write_text(text_file.read_text())
    other = adapruner.recover(run, data=str(tmp_path / "other.txt"), output=tmp_path / "d", steps=1, seq_len=16).config
    assert (other["train"], other["learning_rate"], other["label_weight"]) == ("ia3", config["learning_rate"], 0.5)
    card = (run / "recovered" / "README.md").read_text()
    assert "It was trained to predict as the dense model does" in card
    assert "It was fine-tuned on" in card
    with pytest.raises(AdaPrunerError, match=r"name `data`: .* is not the folder of a run"):
        adapruner.recover(model_folder)


def test_a_run_on_a_dataset_of_ones_own_is_trained_further(healed, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("adapruner.text.sources._registered", {})
    run = Path(shutil.copytree(healed.output, tmp_path / "run"))
    entry = {"split": "train", "columns": ["text"], "local": {"train": str(text_file)}}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"mine": entry}))
    config = PruneConfig.load(run / "config.yaml")
    own = {"sources": str(tmp_path / "sources.yaml"), "calibration": "mine"}
    config.model_copy(update=own).save(run / "config.yaml")
    assert adapruner.recover(run, steps=1).config["data"] == "mine@calibration"


def test_with_many_tokens_the_layers_learn_and_the_embeddings_do_not(
    healed, compensated, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("adapruner.run.memory.TOKENS_FOR_ALL_WEIGHTS", 1)
    run = Path(shutil.copytree(healed.output, tmp_path / "run"))
    options = OPTIONS | {"heal": "20k", "overwrite": True}
    result = adapruner.prune(str(model_folder), output=run, calibration=str(text_file), **options)
    assert result.result.healing.trained == "layers"
    before, after = (adapruner.load(folder) for folder in (compensated, run / "model"))
    for name, weight in after.named_parameters():
        assert weight.equal(before.get_parameter(name)) != name.startswith("model.layers."), name

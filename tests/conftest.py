"""Tiny random models of every family, and a tokenizer to go with them."""

import gc
import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner.model.architecture import known_architectures
from run_helpers import FEW_ABILITIES, RUN_OPTIONS

VOCABULARY = 96

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts jobs in the background so, and every process that a test starts would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a family has beyond the common fields, so that all of it is covered somewhere.
FAMILY_FIELDS: dict[str, dict[str, object]] = {
    "bloom": {},
    "gemma": {},
    "gemma2": {
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt2": {"max_position_embeddings": 64},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "olmo2": {},
    "opt": {"max_position_embeddings": 64, "word_embed_proj_dim": 48},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen3": {},
    "stablelm": {
        "use_qkv_bias": True,
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}
WITH_HEAD_DIM = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen3")


def tiny_model(model_type: str = "llama", key_value_heads: int = 3, **fields: object) -> PreTrainedModel:
    """A random model with 4 layers, 6 heads of 8 and 24 channels, unless `fields` say otherwise; every weight matters,
    biases too."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **FAMILY_FIELDS[model_type],
        **fields,
    }
    config_fields = known_architectures()[model_type].config_fields
    if config_fields.key_value_heads:
        options[config_fields.key_value_heads] = key_value_heads
    if model_type != "bloom":  # four times the hidden size, always
        options[config_fields.channels] = 24
    if model_type in WITH_HEAD_DIM:
        options["head_dim"] = 8
    if types := options.get("layer_types"):
        options["layer_types"] = (types * options["num_hidden_layers"])[: options["num_hidden_layers"]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(autouse=True, scope="session")
def _cache_of_families(tmp_path_factory):
    """Families are checked once for all tests, also of other workers, and nothing is left with the user."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(shared / "hub"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk():
    """A power failure alone takes what was written and is not on the disk yet; a kill does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapruner.base.files._flush", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_abilities():
    """A token takes as long to generate as a batch of windows to judge, and every run generates them."""
    with pytest.MonkeyPatch.context() as patch:
        for setting in FEW_ABILITIES:
            patch.setattr(*setting)
        yield


@pytest.fixture(autouse=True, scope="module")
def _thaws():
    """What the tests of a module left in cycles is freed after the last of them."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _garbage_is_looked_for_in_a_test_alone():
    """A training collects garbage again and again, and looks at every module and test that is known for it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _families_of_the_package():
    """Families that a test registers are for the process, and gone after the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapruner.model.architecture._registered", {})
        patch.setattr("adapruner.model.architecture._inferred", {})
        yield


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def windows():
    return torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny model with its tokenizer, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """200 different paragraphs of 20 words."""
    return write_paragraphs(tmp_path_factory.mktemp("texts") / "text.txt", 200)


def write_paragraphs(path, count, words=20):
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(0, VOCABULARY - 4, (count, words), generator=generator).tolist()
    path.write_text("\n\n".join(" ".join(f"w{number}" for number in row) for row in numbers))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, model_folder, text_file):
    """An undisturbed run with `RUN_OPTIONS`; tests that change it take a copy."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    return adapruner.prune(str(model_folder), output=output, calibration=str(text_file), **RUN_OPTIONS)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished.output, tmp_path / "run"))


@pytest.fixture
def prune(model_folder, text_file, tmp_path):
    """Prunes the tiny model with the text; into the folder of `run`, if nothing else is said."""
    defaults = {"model": str(model_folder), "calibration": str(text_file), "output": tmp_path / "run"}
    return lambda **options: adapruner.prune(**defaults | options)

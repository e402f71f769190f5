"""llama.cpp itself as the judge of GGUF files, with text and a tokenizer for it."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 400  # more than the tokenizer has

# Without sliding windows, which cannot be exported.
FULL_ATTENTION: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8},
}


class LlamaCpp:
    """A file loaded by llama.cpp, computing in float32."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 256
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        return self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self._post("completion", request)["tokens"]

    def apply_chat_template(self, message: str) -> str:
        return self._post("apply-template", {"messages": [{"role": "user", "content": message}]})["prompt"]

    def next_token_log_probabilities(self, prompt: list[int], count: int) -> dict[int, float]:
        # A token whose text is no whole letter comes without probabilities: have it write one, which they do not show.
        request = {"prompt": prompt, "n_predict": 1, "n_probs": count, "logit_bias": [[self.tokenize("a")[-1], 1000]]}
        [position] = self._post("completion", request)["completion_probabilities"]
        return {candidate["id"]: candidate["logprob"] for candidate in position["top_logprobs"]}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer


@pytest.fixture(scope="session")
def llama_cpp():
    return LlamaCpp


@pytest.fixture
def tiny(make_model):
    def make(family: str = "llama", key_value_heads: int = 3, **fields: object) -> PreTrainedModel:
        return make_model(family, key_value_heads, **{"vocab_size": VOCABULARY} | FULL_ATTENTION[family] | fields)

    return make


@pytest.fixture(scope="session")
def texts():
    return [
        "The capital of France is Paris.",
        "In 1984 and 12345 days, it'll cost $3.50; we'RE done!",
        "  two  spaces\n\n\tand a tab \r\n at the end  ",
        "Grüße, naïve café — 東京 Привет 🙂",
        "def f(x):\n    return x**2  # comment",
        "<s>user text</s> with <tool> inside",
    ]


@pytest.fixture(scope="session")
def with_special_tokens():
    """Adds special tokens, and one that is none, to a tokenizer."""

    def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        backend.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
        backend.add_tokens([AddedToken("<tool>", normalized=False)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    return wrapped


@pytest.fixture(scope="session")
def byte_level(texts, with_special_tokens):
    """Makes byte-level BPE that splits text in the given steps; by default as GPT-2 does."""

    def make(*steps: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if steps else gpt2
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts * 2, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet))
        return with_special_tokens(backend)

    return make


@pytest.fixture(scope="session")
def bytes_tokenizer(byte_level):
    return byte_level()

"""What `--small` prunes: a tiny random model, a tokenizer of a few words, random texts; and options of a short
run."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ["the", "a", "of", "and", "to", "in", "is", "was", "with", "from", "river", "city", "music", "game", "king"]
WORDS += ["school", "water", "light", "house", "year", "people", "world", "state", "war", "film", "book", "stone"]
OPTIONS = {
    "pool": 8,
    "samples": 4,
    "objective_windows": 4,
    "compensation_windows": 16,
    "limit": 4,
    "seq_len": 16,
    "trials": 5,
    "round_to": 1,
    "heal": "none",
}


def model(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        # With 40, an expert of each layer is a fifth of the parameters; in bfloat16, experts need multiples of 8.
        intermediate_size=40 if family == "mixtral" else 128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer():
    numbers = {word: number for number, word in enumerate((*SPECIAL.values(), *WORDS))}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def texts():
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=30)) for _ in range(200)]

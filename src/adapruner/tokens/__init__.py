"""The vocabulary as something that is pruned: counting and choosing tokens, smaller tokenizer, smaller model."""

from adapruner.tokens._choosing import Vocabulary, VocabularySummary, choose_tokens
from adapruner.tokens._counting import count_tokens, foreign_tokens
from adapruner.tokens._model import cut_config, cut_vocabulary, named_tokens, read_generation_config
from adapruner.tokens._selecting import select_vocabulary
from adapruner.tokens._tokenizer import TokenizerParts, cut_tokenizer

__all__ = [
    "TokenizerParts",
    "Vocabulary",
    "VocabularySummary",
    "choose_tokens",
    "count_tokens",
    "cut_config",
    "cut_tokenizer",
    "cut_vocabulary",
    "foreign_tokens",
    "named_tokens",
    "read_generation_config",
    "select_vocabulary",
]

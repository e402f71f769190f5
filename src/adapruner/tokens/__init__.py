"""Pruning of the vocabulary: counting and choosing tokens, smaller tokenizer, smaller model."""

from adapruner.tokens._choosing import (
    Vocabulary as Vocabulary,
    VocabularySummary as VocabularySummary,
    choose_tokens as choose_tokens,
)
from adapruner.tokens._counting import count_tokens as count_tokens
from adapruner.tokens._model import (
    configs_with_tokens as configs_with_tokens,
    cut_config as cut_config,
    cut_vocabulary as cut_vocabulary,
    named_tokens as named_tokens,
)
from adapruner.tokens._selecting import select_vocabulary as select_vocabulary
from adapruner.tokens._tokenizer import TokenizerParts as TokenizerParts, cut_tokenizer as cut_tokenizer

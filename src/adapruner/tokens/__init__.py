"""Pruning of the vocabulary: counting and choosing tokens, smaller tokenizer, smaller model."""

"""Removal of tokens from a model: counting and choosing them, smaller tokenizer, smaller model."""

"""Checkpoints: Hugging Face folders that load with and without this package, GGUF files, model cards, uploads."""

from adapruner.checkpoint._card import card_of_export, card_of_recovered, model_card, read_card
from adapruner.checkpoint._folder import save_checkpoint, write_card
from adapruner.checkpoint._gguf import check_gguf, write_gguf
from adapruner.checkpoint._hub import check_push, push

__all__ = [
    "card_of_export",
    "card_of_recovered",
    "check_gguf",
    "check_push",
    "model_card",
    "push",
    "read_card",
    "save_checkpoint",
    "write_card",
    "write_gguf",
]

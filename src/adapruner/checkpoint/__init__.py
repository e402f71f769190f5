"""Checkpoints: Hugging Face folders that load with and without this package, GGUF files, model cards, uploads."""

from adapruner.checkpoint._card import card_of_export, card_of_recovered, model_card, read_card
from adapruner.checkpoint._folder import is_replaceable, read_origin, save_checkpoint, write_card
from adapruner.checkpoint._gguf import GgufType, check_gguf, write_gguf
from adapruner.checkpoint._hub import check_push, push

__all__ = [
    "GgufType",
    "card_of_export",
    "card_of_recovered",
    "check_gguf",
    "check_push",
    "is_replaceable",
    "model_card",
    "push",
    "read_card",
    "read_origin",
    "save_checkpoint",
    "write_card",
    "write_gguf",
]

"""Checkpoints: Hugging Face folders that load with and without this package, and uploads."""

from adapruner.checkpoint._folder import is_replaceable, made_beside, read_origin, save_checkpoint, write_card
from adapruner.checkpoint._hub import check_push, push

__all__ = [
    "check_push",
    "is_replaceable",
    "made_beside",
    "push",
    "read_origin",
    "save_checkpoint",
    "write_card",
]

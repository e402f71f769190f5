"""Checkpoints: Hugging Face folders that load with and without this package."""

from adapruner.checkpoint._card import model_card
from adapruner.checkpoint._folder import save_checkpoint, write_card
from adapruner.checkpoint._gguf import GgufType, write_gguf
from adapruner.checkpoint._hub import check_push, push

__all__ = ["GgufType", "check_push", "model_card", "push", "save_checkpoint", "write_card", "write_gguf"]

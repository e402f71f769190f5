"""Checkpoints: Hugging Face folders that load with and without this package."""

from adapruner.checkpoint._folder import save_checkpoint
from adapruner.checkpoint._gguf import GgufType, write_gguf

__all__ = ["GgufType", "save_checkpoint", "write_gguf"]

"""Checkpoints: Hugging Face folders that load with and without this package."""

from adapruner.checkpoint._folder import save_checkpoint

__all__ = ["save_checkpoint"]

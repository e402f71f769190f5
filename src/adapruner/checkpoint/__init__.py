"""Checkpoints: Hugging Face folders that load with and without this package."""

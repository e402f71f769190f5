"""Cutting a model by a plan, and compensation for what was removed."""

"""Cutting a model by a plan, and compensation for what was removed."""

from adapruner.surgery._compensation import Compensation, CompensationForm, compensate
from adapruner.surgery._cut import kept_layers, prune_model, prune_on_reading
from adapruner.surgery._sequential import refit_sequentially
from adapruner.surgery._stock import check_paddable, fields_of_layers, is_as_large_as_dense, pad_to_stock

__all__ = [
    "Compensation",
    "CompensationForm",
    "check_paddable",
    "compensate",
    "fields_of_layers",
    "is_as_large_as_dense",
    "kept_layers",
    "pad_to_stock",
    "prune_model",
    "prune_on_reading",
    "refit_sequentially",
]

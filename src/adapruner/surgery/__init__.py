"""Cutting a model by a plan, and compensation for what was removed."""

from adapruner.surgery._compensation import compensate as compensate
from adapruner.surgery._cut import (
    prune_model as prune_model,
    prune_on_reading as prune_on_reading,
)
from adapruner.surgery._sequential import refit_sequentially as refit_sequentially

"""One pass over the pool for Taylor and activation statistics, one over more text for second moments."""

from adapruner.measurement._moments import InputMoments, StoredMoments, measure_moments, projected_blocks
from adapruner.measurement._removal import removal_errors
from adapruner.measurement._samples import measure, measure_in_parts, saved_activations
from adapruner.measurement._solving import add_products, factorize, solve_damped, symmetric
from adapruner.measurement._statistics import Statistics

__all__ = [
    "InputMoments",
    "Statistics",
    "StoredMoments",
    "add_products",
    "factorize",
    "measure",
    "measure_in_parts",
    "measure_moments",
    "projected_blocks",
    "removal_errors",
    "saved_activations",
    "solve_damped",
    "symmetric",
]

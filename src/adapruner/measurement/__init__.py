"""One pass over the pool for Taylor and activation statistics, one over more text for second moments."""

from adapruner.measurement._moments import (
    InputMoments,
    StoredMoments,
    factorize,
    measure_moments,
    moments_passes,
    removal_errors,
)
from adapruner.measurement._samples import Statistics, measure, measure_in_parts

__all__ = [
    "InputMoments",
    "Statistics",
    "StoredMoments",
    "factorize",
    "measure",
    "measure_in_parts",
    "measure_moments",
    "moments_passes",
    "removal_errors",
]

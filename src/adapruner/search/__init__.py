"""The joint search over calibration samples and importance metrics."""

from adapruner.search._objective import Objective, in_fastest_dtype
from adapruner.search._space import Candidate, Searched, SearchSpace, StartingPoint, order_by_likeness
from adapruner.search._study import Found, SearchResult, search

__all__ = [
    "Candidate",
    "Found",
    "Objective",
    "SearchResult",
    "SearchSpace",
    "Searched",
    "StartingPoint",
    "in_fastest_dtype",
    "order_by_likeness",
    "search",
]

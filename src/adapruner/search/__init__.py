"""The joint search over calibration samples and importance metrics."""

from adapruner.search._objective import Objective, in_fastest_dtype, plan_candidate
from adapruner.search._space import Candidate, Searched, SearchSpace, StartingPoint
from adapruner.search._study import Found, SearchResult, search
from adapruner.search._subsets import FEATURES, SubsetFamily, build_subset_family

__all__ = [
    "FEATURES",
    "Candidate",
    "Found",
    "Objective",
    "SearchResult",
    "SearchSpace",
    "Searched",
    "StartingPoint",
    "SubsetFamily",
    "build_subset_family",
    "in_fastest_dtype",
    "plan_candidate",
    "search",
]

"""The joint search over calibration samples, importance metrics and allocation."""

from adapruner.search._objective import Objective, plan_candidate
from adapruner.search._space import Candidate, Searched, SearchSpace, SpaceName, StartingPoint
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
    "SpaceName",
    "StartingPoint",
    "SubsetFamily",
    "build_subset_family",
    "plan_candidate",
    "search",
]

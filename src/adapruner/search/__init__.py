"""The joint search over calibration samples, importance metrics and allocation."""

from adapruner.search._history import History, TriedPoint, read_history
from adapruner.search._objective import Objective, plan_candidate
from adapruner.search._shared import StudyPlace
from adapruner.search._space import MOST_PROTECTED_FIRST, Candidate, Searched, SearchSpace, SpaceName, StartingPoint
from adapruner.search._study import Found, Search, SearchResult
from adapruner.search._subsets import FEATURES, SubsetFamily, build_subset_family

__all__ = [
    "FEATURES",
    "MOST_PROTECTED_FIRST",
    "Candidate",
    "Found",
    "History",
    "Objective",
    "Search",
    "SearchResult",
    "SearchSpace",
    "Searched",
    "SpaceName",
    "StartingPoint",
    "StudyPlace",
    "SubsetFamily",
    "TriedPoint",
    "build_subset_family",
    "plan_candidate",
    "read_history",
]

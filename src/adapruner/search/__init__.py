"""The joint search over calibration samples, importance metrics and allocation."""

from adapruner.search._history import History, TriedPoint, read_history
from adapruner.search._objective import ItemLosses, Objective, meet_budget, plan_candidate
from adapruner.search._result import SearchResult
from adapruner.search._space import MOST_PROTECTED_FIRST, Candidate, SearchSpace
from adapruner.search._study import JUDGED_TOGETHER, Search
from adapruner.search._study_file import StudyFile
from adapruner.search._subsets import SubsetFamily, build_subset_family
from adapruner.search._whole import MOST_WHOLE, RemovalOrders, removal_orders
from adapruner.search.levelling import KeptPart, Levelled, MovedChannels, MovedHeads, level

__all__ = [
    "JUDGED_TOGETHER",
    "MOST_PROTECTED_FIRST",
    "MOST_WHOLE",
    "Candidate",
    "History",
    "ItemLosses",
    "KeptPart",
    "Levelled",
    "MovedChannels",
    "MovedHeads",
    "Objective",
    "RemovalOrders",
    "Search",
    "SearchResult",
    "SearchSpace",
    "StudyFile",
    "SubsetFamily",
    "TriedPoint",
    "build_subset_family",
    "level",
    "meet_budget",
    "plan_candidate",
    "read_history",
    "removal_orders",
]

"""The joint search over calibration samples, importance metrics and allocation."""

from adapruner.search._history import History, TriedPoint, read_history
from adapruner.search._levelling import KeptPart, Levelled, MovedChannels, MovedHeads, level
from adapruner.search._objective import ItemLosses, Objective, meet_budget, plan_candidate
from adapruner.search._result import SearchResult
from adapruner.search._space import Candidate, ExtendedSpace, PaperSpace, SearchSpace, reused_layers
from adapruner.search._study import JUDGED_TOGETHER, Search
from adapruner.search._study_file import StudyFile
from adapruner.search._subsets import SubsetFamily, build_subset_family
from adapruner.search._whole import MOST_WHOLE, RemovalOrders, removal_orders

__all__ = [
    "JUDGED_TOGETHER",
    "MOST_WHOLE",
    "Candidate",
    "ExtendedSpace",
    "History",
    "ItemLosses",
    "KeptPart",
    "Levelled",
    "MovedChannels",
    "MovedHeads",
    "Objective",
    "PaperSpace",
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
    "reused_layers",
]

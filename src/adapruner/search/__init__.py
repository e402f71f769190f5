"""The joint search over calibration samples, importance metrics and allocation."""

from adapruner.search._attention_order import (
    AttentionOrder as AttentionOrder,
    attention_order as attention_order,
    measurements as measurements,
)
from adapruner.search._history import History as History, TriedPoint as TriedPoint
from adapruner.search._levelling import (
    KeptAttention as KeptAttention,
    Levelled as Levelled,
    MovedChannels as MovedChannels,
    MovedHeads as MovedHeads,
    level as level,
)
from adapruner.search._objective import (
    JUDGED_TOGETHER as JUDGED_TOGETHER,
    Objective as Objective,
    at_budget as at_budget,
    plan_candidate as plan_candidate,
)
from adapruner.search._result import SearchResult as SearchResult
from adapruner.search._space import (
    Candidate as Candidate,
    ExtendedSpace as ExtendedSpace,
    PaperSpace as PaperSpace,
    SearchSpace as SearchSpace,
    reused_layers as reused_layers,
)
from adapruner.search._study import Search as Search
from adapruner.search._study_file import StudyFile as StudyFile
from adapruner.search._subsets import SubsetFamily as SubsetFamily, build_subset_family as build_subset_family

__version__: str

from adapruner.base.errors import AdaPrunerError as AdaPrunerError
from adapruner.base.progress import StageCost as StageCost
from adapruner.budget.counts import Budget as Budget, Profile as Profile, kept_counts as kept_counts
from adapruner.budget.plan import PruningPlan as PruningPlan, make_plan as make_plan
from adapruner.evaluation.losses import Perplexity as Perplexity
from adapruner.evaluation.speed import Speed as Speed
from adapruner.evaluation.tasks import TaskScore as TaskScore
from adapruner.formats import register_format as register_format
from adapruner.importance import (
    MetricPoint as MetricPoint,
    Term as Term,
    register_term as register_term,
    score_groups as score_groups,
)
from adapruner.measurement.taylor import Statistics as Statistics, measure as measure
from adapruner.model.architecture import Architecture as Architecture, register_architectures as register_architectures
from adapruner.options import (
    PruneConfig as PruneConfig,
    PruneOptions as PruneOptions,
    RecoveryOptions as RecoveryOptions,
)
from adapruner.report.result import RunResult as RunResult
from adapruner.run.evaluate import Evaluation as Evaluation, evaluate as evaluate
from adapruner.run.export import PrunedVocabulary as PrunedVocabulary, export as export, vocabulary as vocabulary
from adapruner.run.folder import PruneResult as PruneResult
from adapruner.run.prune import prune as prune
from adapruner.run.recover import recover as recover
from adapruner.run.steps import (
    benchmark as benchmark,
    compensate as compensate,
    cut as cut,
    inspect as inspect,
    load as load,
    load_tokenizer as load_tokenizer,
    make_windows as make_windows,
    score as score,
)
from adapruner.search.study import TriedPoint as TriedPoint
from adapruner.structure.blocks import Block as Block, Structure as Structure
from adapruner.structure.build import build_structure as build_structure
from adapruner.text.reading import read_documents as read_documents
from adapruner.text.sources import parse_source as parse_source, register_sources as register_sources

"""Quality and speed of a model: perplexity, tasks of lm-eval, tokens per second, each with its protocol."""

from adapruner.evaluation._breakage import (
    PROTOCOLS_OF_SIGNS as PROTOCOLS_OF_SIGNS,
    Breakage as Breakage,
    Writing as Writing,
    judge_writing as judge_writing,
    measure_breakage as measure_breakage,
)
from adapruner.evaluation._losses import (
    Prefix as Prefix,
    compute_prefix as compute_prefix,
    finite_windows as finite_windows,
    log_probabilities as log_probabilities,
    losses_after_layers as losses_after_layers,
    losses_by_batch as losses_by_batch,
    losses_in_step as losses_in_step,
    may_overflow as may_overflow,
    window_losses as window_losses,
)
from adapruner.evaluation._perplexity import (
    PROTOCOLS as PROTOCOLS,
    Perplexity as Perplexity,
    measure_perplexity as measure_perplexity,
)
from adapruner.evaluation._speed import (
    SPEED_TOKENS as SPEED_TOKENS,
    Rate as Rate,
    Speed as Speed,
    count_macs as count_macs,
    measure_speed as measure_speed,
    new_cache as new_cache,
)
from adapruner.evaluation._tasks import (
    Tasks as Tasks,
    TaskScore as TaskScore,
    check_tasks as check_tasks,
    load_tasks as load_tasks,
    mean_accuracies as mean_accuracies,
    measure_tasks as measure_tasks,
)
from adapruner.evaluation._verdict import Verdict as Verdict, judge as judge
from adapruner.evaluation._writing import (
    Written as Written,
    end_tokens as end_tokens,
    number_of_texts as number_of_texts,
    write as write,
)

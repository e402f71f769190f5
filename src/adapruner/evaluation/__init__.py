"""Quality and speed of a model: perplexity, tasks of lm-eval, tokens per second, each with its protocol."""

from adapruner.evaluation._perplexity import measure_perplexity as measure_perplexity

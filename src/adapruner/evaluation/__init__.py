"""Quality and speed of a model: perplexity, tasks of lm-eval, tokens per second, each with its protocol."""

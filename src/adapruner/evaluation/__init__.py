"""Quality and speed of a model: perplexity, abilities, tasks of lm-eval, tokens per second."""

"""A run: from a model and options to a pruned checkpoint, its numbers and its report."""

"""Text: names, reading, disjoint parts of datasets, windows of tokens, and what a model writes itself."""

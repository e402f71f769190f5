"""The outcome of a run: result.json, the model card and the page."""

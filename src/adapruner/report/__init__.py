"""The report: a self-contained HTML page of a run folder."""

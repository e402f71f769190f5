"""The report of a run: one HTML page that needs nothing else, written from what the run folder holds."""

from adapruner.report._page import write_report

__all__ = ["write_report"]

"""The report of a run: one self-contained HTML page, written from what the run folder holds."""

from adapruner.report._page import render_report, write_reports

__all__ = ["render_report", "write_reports"]

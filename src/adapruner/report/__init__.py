"""The report: a self-contained HTML page of a run folder."""

from adapruner.report._page import render_report as render_report, write_report as write_report

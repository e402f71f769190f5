"""Reports: a self-contained HTML page of a run folder, or of a comparison."""

from adapruner.report._comparison import render_comparison as render_comparison
from adapruner.report._page import render_report as render_report, write_reports as write_reports

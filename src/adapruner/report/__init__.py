"""Reports: one self-contained HTML page, of a run from what its folder holds, or of a comparison."""

from adapruner.report._comparison import render_comparison, write_comparison
from adapruner.report._page import render_report, write_reports

__all__ = ["render_comparison", "render_report", "write_comparison", "write_reports"]

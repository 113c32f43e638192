"""Reads runs, sets them side by side, and shows them: tables, figures, one HTML page.

Importing this package loads neither matplotlib nor rich nor jax; each is
loaded when something is drawn.
"""

from __future__ import annotations

from stacking_jax.reporting.command import compare
from stacking_jax.reporting.comparison import Comparison, Row, compare_runs
from stacking_jax.reporting.html import report_html, write_report
from stacking_jax.reporting.runs import Run, read_run
from stacking_jax.reporting.tables import comparison_table, plan_table

__all__ = [
    "Comparison",
    "Row",
    "Run",
    "compare",
    "compare_runs",
    "comparison_table",
    "plan_table",
    "read_run",
    "report_html",
    "write_report",
]

"""Report the result of a run: its final metrics, what to change, and an HTML page with all curves."""

from sgpo_async.report.close import close_run
from sgpo_async.report.closing import final_rows
from sgpo_async.report.page import write_report

__all__ = ["close_run", "final_rows", "write_report"]

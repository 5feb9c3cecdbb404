"""What a run came to: the closing figures, and a page of curves that needs nothing but a browser."""

from sgpo_async.report.closing import closing_rows
from sgpo_async.report.page import write_report

__all__ = ["closing_rows", "write_report"]

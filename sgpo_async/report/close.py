"""The files that stand for a run after its end, whoever started its learner and however it ended."""

from __future__ import annotations

import logging
from pathlib import Path

from sgpo_async.errors import SgpoError
from sgpo_async.files import to_json, write_whole, written_since
from sgpo_async.metrics import read_metrics
from sgpo_async.metrics.reader import METRICS, SUMMARY
from sgpo_async.report.closing import summarise
from sgpo_async.report.page import write_report

log = logging.getLogger(__name__)


def close_run(folder: Path, *, since: float) -> None:
    """Write report.html, and summary.json if the learner has not, and log where they are.

    Does nothing if the learner, which began at `since` (seconds since the epoch), came to no step. An error is logged:
    it must not replace the one with which the learner may have ended.
    """
    try:
        if not written_since(folder / METRICS, since) or not (lines := read_metrics(folder)):
            return
        if not written_since(folder / SUMMARY, since):
            write_whole(folder / SUMMARY, to_json(summarise(lines) | {"interrupted": True}, indent=2) + "\n")
        log.info("report: %s", write_report(folder))
    except SgpoError as error:
        log.warning("no report: %s", error)
    except Exception:
        log.exception("no report, because of an internal error")

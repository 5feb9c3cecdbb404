"""The report and the summary of a learner that has ended, in whatever way."""

import json
import os
import time
from pathlib import Path

import pytest
from synthetic_metrics import synthetic_lines

from sgpo_async.files import to_json
from sgpo_async.local.run_folder import summary_written
from sgpo_async.metrics import MetricsWriter, read_summary
from sgpo_async.report import final_rows
from sgpo_async.report.close import close_run

BEFORE = 1000.0  # when an earlier run has ended


def write_metrics(folder: Path, steps: int = 12) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in synthetic_lines(steps)))


def test_an_interrupted_run_has_a_summary_that_says_so_and_a_report(tmp_path: Path) -> None:
    began = time.time() - 5
    write_metrics(tmp_path)
    close_run(tmp_path, since=began)
    summary = read_summary(tmp_path)
    assert summary["interrupted"] is True and summary["steps"] == 12
    assert not summary_written(tmp_path, began), "the learner has not trained all steps"
    assert ("steps", "12 (interrupted)") in final_rows(tmp_path)
    assert "interrupted after 12 steps" in (tmp_path / "report.html").read_text()


def test_the_summary_of_a_finished_run_is_kept(tmp_path: Path) -> None:
    began = time.time() - 5
    write_metrics(tmp_path)
    (tmp_path / "summary.json").write_text('{"steps": 12}\n')
    close_run(tmp_path, since=began)
    assert read_summary(tmp_path) == {"steps": 12}
    assert summary_written(tmp_path, began)
    assert ("steps", "12") in final_rows(tmp_path)
    assert "interrupted" not in (tmp_path / "report.html").read_text()


def test_the_summary_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    (tmp_path / "summary.json").write_text('{"steps": 99}\n')
    os.utime(tmp_path / "summary.json", (BEFORE, BEFORE))
    close_run(tmp_path, since=time.time() - 5)
    assert read_summary(tmp_path)["steps"] == 12


@pytest.mark.parametrize("kind", ["missing folder", "no metrics", "no step", "of an earlier run"])
def test_a_learner_that_came_to_no_step_writes_nothing(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    if kind != "missing folder":
        write_metrics(folder, 3)
    if kind == "no metrics":
        (folder / "metrics.jsonl").unlink()
    if kind == "no step":
        (folder / "metrics.jsonl").write_text('{"step": 1')
    if kind == "of an earlier run":
        os.utime(folder / "metrics.jsonl", (BEFORE, BEFORE))
    close_run(folder, since=time.time() - 5)
    assert not (folder / "report.html").exists() and not (folder / "summary.json").exists()


@pytest.mark.parametrize("broken", ["metrics.jsonl", "samples.jsonl", "config.yaml"])
def test_an_error_is_logged_and_does_not_replace_that_of_the_learner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    write_metrics(tmp_path)
    (tmp_path / broken).write_text("{[\n")
    close_run(tmp_path, since=time.time() - 5)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith("no report: ") and broken in record.getMessage()


def test_a_new_run_or_attempt_removes_the_summary_of_the_last_one(tmp_path: Path) -> None:
    for resume_from in (0, 2):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": 99}))
        MetricsWriter(tmp_path, resume_from=resume_from).close()
        assert read_summary(tmp_path) == {}

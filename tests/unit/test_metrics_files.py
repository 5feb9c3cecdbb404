"""metrics.jsonl, summary.json and TensorBoard files are written step by step and readable after a crash."""

import errno
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgpo_async.errors import DataError, SgpoError
from sgpo_async.files import JsonLinesReader, JsonLinesWriter, to_json, write_whole
from sgpo_async.metrics import MetricsTail, MetricsWriter, read_metrics, read_summary


def test_a_step_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step({"step": 1, "loss": 0.5, "lag_histogram": {0: 3, 1: 2}, "ledger": {"dropped": {"stale": 1}}})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "lag_histogram": {"0": 3, "1": 2}, "ledger": {"dropped": {"stale": 1}}}
    ]
    writer.close()


def test_nan_and_infinity_become_null_at_every_depth() -> None:
    values = {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": np.float32(math.nan), "e": np.int64(3)}, "f": np.ones(2)}
    assert json.loads(to_json(values)) == {"a": None, "b": [None, 1.0], "c": {"d": None, "e": 3}, "f": [1.0, 1.0]}


def test_an_incomplete_last_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    tail = MetricsTail(tmp_path)
    assert tail.poll() == [{"step": 1}]
    assert tail.poll() == []
    with path.open("a") as file:
        file.write('ss": 3}\n')
    assert tail.poll() == [{"step": 2, "loss": 3}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(cut=st.integers(0, 200), steps=st.integers(0, 8))
def test_a_truncated_file_yields_exactly_its_complete_lines(tmp_path: Path, cut: int, steps: int) -> None:
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(steps)]
    text = "".join(lines)[:cut]
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(text.count("\n")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{nonsense}", r"is not JSON \(.*\); remove the line"),
        ("[1, 2]", "must be an object with an integer 'step'; remove the line"),
        ('{"loss": 1}', "must be an object with an integer 'step'; remove the line"),
    ],
)
def test_the_error_for_an_invalid_line_names_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=rf"metrics\.jsonl:2: {reason}$"):
        read_metrics(tmp_path)


def test_the_tail_starts_again_when_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    tail = MetricsTail(tmp_path)
    tail.poll()
    path.write_text('{"step": 1}\n')
    assert tail.poll() == [{"step": 1}]


def test_a_new_run_deletes_old_metrics_and_a_resumed_run_keeps_those_up_to_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        first.step({"step": step})
    first.close()
    resumed = MetricsWriter(tmp_path, resume_from=2)
    resumed.step({"step": 3, "again": True})
    resumed.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        SgpoError, match=r"summary\.json: cannot be written \(No space left on device\); free"
    ) as caught:
        write_whole(tmp_path / "summary.json", "{}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_a_step_gives_a_one_line_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from sgpo_async.files import reporting_write_errors

    full = Path("/dev/full")
    with (
        pytest.raises(SgpoError, match="/dev/full: cannot be written"),
        reporting_write_errors(full),
        full.open("w") as file,
    ):
        file.write("x")


def test_a_new_summary_replaces_the_old_one(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    writer = MetricsWriter(tmp_path)
    writer.summary({"steps": 1})
    writer.summary({"steps": 2, "pass_auto_last": math.nan})
    writer.close()
    assert read_summary(tmp_path) == {"steps": 2, "pass_auto_last": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3), max_size=6),
    st.integers(0, 400),
)
def test_json_lines_survive_a_cut_at_any_byte(lines: list[dict[str, Any]], cut: int) -> None:
    """After a kill the complete lines are readable, and the next writer appends to them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.jsonl")
        writer = JsonLinesWriter(path)
        for line in lines:
            writer.append(line)
        writer.close()
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        kept = [json.loads(line) for line in whole[:cut].split(b"\n")[:-1]]
        assert JsonLinesReader(path).poll() == list(enumerate(kept, 1))
        writer = JsonLinesWriter(path)
        writer.append({"next": 1})
        writer.close()
        assert [values for _, values in JsonLinesReader(path).poll()] == [*kept, {"next": 1}]


def test_a_reader_of_json_lines_follows_a_file_and_starts_again_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    reader = JsonLinesReader(path)
    assert reader.poll() == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert reader.poll() == [(1, {"a": 1})]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert reader.poll() == [(2, {"a": 2})]
    path.write_text("[3]\n")
    assert reader.poll() == [(1, [3])]
    path.write_text("[3]\nno\n")
    with pytest.raises(DataError, match=r"lines\.jsonl:2: is not JSON"):
        reader.poll()

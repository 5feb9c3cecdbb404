"""samples.jsonl keeps groups of evenly spaced steps, below its size, also across resumptions."""

from pathlib import Path
from typing import Any

import pytest

from sgpo_async.errors import DataError
from sgpo_async.metrics.samples import SAMPLES, SamplesTail, SamplesWriter, read_samples


def group(step: int, text: str = "x") -> dict[str, Any]:
    return {"step": step, "task": 10 * step, "rollouts": [{"slot": 0, "text": text}]}


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_samples(folder)]


def fill(writer: SamplesWriter, first: int, last: int, *, per_step: int = 1, text: str = "x") -> None:
    """Append the groups of all steps that are due, as the learner does."""
    for step in range(first, last + 1):
        if writer.due(step):
            writer.append([group(step, text)] * per_step)


def test_every_step_is_kept_while_the_file_is_small(tmp_path: Path) -> None:
    writer = SamplesWriter(tmp_path, max_bytes=2**20)
    fill(writer, 1, 5, per_step=2)
    writer.close()
    assert steps(tmp_path) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert read_samples(tmp_path)[0] == group(1)


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("last", [9, 64, 700])
def test_a_long_run_stays_below_the_limit_and_is_covered_evenly(tmp_path: Path, last: int, per_step: int) -> None:
    limit = 4000
    writer = SamplesWriter(tmp_path, max_bytes=limit)
    for step in range(1, last + 1):
        if writer.due(step):
            writer.append([group(step, "x" * 100)] * per_step)
        assert (tmp_path / SAMPLES).stat().st_size <= limit
    writer.close()
    kept = sorted(set(steps(tmp_path)))
    assert kept == list(range(1, last + 1, writer.every))
    assert len(kept) * per_step >= limit / 2 / 200 - per_step or writer.every == 1


def test_one_step_larger_than_the_limit_is_kept(tmp_path: Path) -> None:
    writer = SamplesWriter(tmp_path, max_bytes=100)
    fill(writer, 1, 10, per_step=3, text="x" * 200)
    writer.close()
    assert steps(tmp_path) == [1, 1, 1]


@pytest.mark.parametrize("resume_from", [1, 40, 77, 100])
def test_a_resumed_run_writes_the_same_file_as_one_without_interruption(tmp_path: Path, resume_from: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    limit = 4000
    writer = SamplesWriter(whole, max_bytes=limit)
    fill(writer, 1, 300, text="x" * 100)
    writer.close()
    first = SamplesWriter(parts, max_bytes=limit)
    fill(first, 1, 100, text="x" * 100)
    first.close()
    second = SamplesWriter(parts, max_bytes=limit, resume_from=resume_from)
    assert all(step <= resume_from for step in steps(parts))
    fill(second, resume_from + 1, 300, text="x" * 100)
    second.close()
    assert (parts / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    writer = SamplesWriter(tmp_path, max_bytes=2**20)
    fill(writer, 1, 3)
    writer.close()
    SamplesWriter(tmp_path, max_bytes=2**20).close()
    assert read_samples(tmp_path) == []


def test_a_line_that_a_kill_has_cut_off_is_ignored_and_removed(tmp_path: Path) -> None:
    writer = SamplesWriter(tmp_path, max_bytes=2**20)
    fill(writer, 1, 3)
    writer.close()
    path = tmp_path / SAMPLES
    path.write_bytes(path.read_bytes()[:-5])
    assert steps(tmp_path) == [1, 2]
    resumed = SamplesWriter(tmp_path, max_bytes=2**20, resume_from=2)
    fill(resumed, 3, 3)
    resumed.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_reader_that_follows_the_file_sees_every_line_after_it_became_shorter(tmp_path: Path) -> None:
    writer, tail = SamplesWriter(tmp_path, max_bytes=1000), SamplesTail(tmp_path)
    fill(writer, 1, 2)
    assert [line["step"] for line in tail.poll()] == [1, 2]
    fill(writer, 3, 40, text="x" * 100)
    writer.close()
    assert [line["step"] for line in tail.poll()] == steps(tmp_path)


@pytest.mark.parametrize("line", ["[]", '{"step": 1}', '{"step": "1", "rollouts": []}', '{"step": 1, "rollouts": {}}'])
def test_a_line_that_is_no_group_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / SAMPLES).write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"samples.jsonl:1: must be an object .*; remove the line"):
        read_samples(tmp_path)

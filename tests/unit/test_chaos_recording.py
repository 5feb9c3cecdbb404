"""The recording hub's journal keeps every rollout file, under a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_hub_rollout_files import make_rollout

from sgpo_async.chaos.recording import HISTORY, RecordedJournal
from sgpo_async.errors import HubError
from sgpo_async.hub.rollout_files import PREFIX, RolloutFiles
from sgpo_async.wire import encode


def saved(folder: Path, task: int) -> tuple[int, int, tuple[int, ...]]:
    """Start, add a rollout, and save a state that does not need it, so that its file is deleted."""
    journal = RecordedJournal(folder)
    rollout = make_rollout(task)
    place = journal.add_rollout(rollout, encode(rollout))
    journal.commit()
    journal.save(lambda: (b"state", []))
    journal.close()
    return place


def test_a_hub_that_starts_again_without_any_rollout_file_uses_no_number_again(tmp_path: Path) -> None:
    places = [saved(tmp_path, task) for task in range(3)]
    assert not list(tmp_path.glob(f"{PREFIX}*"))
    history = RolloutFiles(tmp_path / HISTORY)
    assert [history.read(place).task for place in places] == [0, 1, 2]


def test_another_file_of_the_same_name_is_an_error_and_the_same_one_is_not(tmp_path: Path) -> None:
    journal = RecordedJournal(tmp_path)
    rollout = make_rollout(1)
    number, *_ = journal.add_rollout(rollout, encode(rollout))
    journal.commit()
    kept = tmp_path / HISTORY / f"{PREFIX}{number}"
    kept.hardlink_to(tmp_path / kept.name)  # as if the hub had been killed after the link
    journal.save(lambda: (b"state", [journal.rollouts.place_of(rollout)]))
    kept.unlink()
    kept.write_bytes(b"another")
    with pytest.raises(HubError, match=f"{kept.name}"):
        journal.save(lambda: (b"state", []))
    journal.close()

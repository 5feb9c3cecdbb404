"""The files of the rollouts to which the hub's journal refers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.hub.rollout_files import NEEDED_SHARE, RolloutFiles
from sgpo_async.wire import encode
from sgpo_async.wire.records import Rollout


def make_rollout(task: int, tokens: int = 50) -> Rollout:
    return Rollout(
        task=task,
        attempt=0,
        slot=0,
        purpose="train",
        guided=False,
        prompt=np.arange(3, dtype=np.int32),
        tokens=np.full(tokens, task, np.int32),
        logprobs=np.full(tokens, -1.0, np.float32),
        versions=np.zeros(1, np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([tokens], np.int32),
        reward=0.0,
        finish="length",
    )


def add(files: RolloutFiles, rollout: Rollout) -> tuple[int, int, tuple[int, ...]]:
    return files.add(rollout, encode(rollout))


def sizes(folder: Path) -> dict[str, int]:
    return {path.name.rpartition(".")[2]: path.stat().st_size for path in folder.iterdir()}


def test_a_rollout_is_read_from_its_place_by_another_process(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    places = [add(files, make_rollout(task)) for task in range(5)]
    files.sync()
    again = RolloutFiles(tmp_path)
    assert [again.read(place).tokens[0] for place in places] == list(range(5))


def test_what_is_kept_keeps_its_file_and_a_new_file_begins(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    rollouts = [make_rollout(task) for task in range(4)]
    places = [add(files, rollout) for rollout in rollouts]
    files.sync()
    files.keep({places[1]})
    assert files.place_of(rollouts[1]) == places[1]
    assert add(files, make_rollout(9))[0] == places[1][0] + 1
    files.sync()
    assert set(sizes(tmp_path)) == {"1", "2"}
    files.keep(set())
    assert sizes(tmp_path) == {}


def test_an_object_that_was_not_added_is_added(tmp_path: Path) -> None:
    """A restored rollout has other versions than the one that arrived, and no frames of its own."""
    files = RolloutFiles(tmp_path)
    arrived, restored = make_rollout(1), make_rollout(1)
    first = add(files, arrived)
    second = files.place_of(restored)
    assert second != first
    assert files.place_of(restored) == second


def test_the_last_rollouts_of_a_file_move_so_that_it_can_be_deleted(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    rollouts = [make_rollout(task) for task in range(20)]
    places = [add(files, rollout) for rollout in rollouts]
    files.sync()
    files.keep(set(places[:1]))  # now it is known that little of the file is needed
    moved = files.place_of(rollouts[0])
    assert moved[0] == places[0][0] + 1
    files.sync()
    files.keep({moved})
    assert set(sizes(tmp_path)) == {str(moved[0])}
    assert files.place_of(rollouts[0]) == moved, "all of its file is needed"


def test_another_process_begins_a_new_file(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    (place,) = [add(files, make_rollout(1))]
    files.sync()
    again = RolloutFiles(tmp_path)
    assert add(again, make_rollout(2))[0] == place[0] + 1
    again.sync()
    assert again.read(place).task == 1


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 12), st.integers(1, 400), st.booleans()), min_size=1, max_size=25
    )
)
def test_no_history_loses_a_rollout_or_keeps_much_more_than_is_needed(
    tmp_path_factory, steps: list[tuple[int, int, int, bool]]
) -> None:
    """Each step adds some rollouts, ends some, saves, and perhaps kills the process."""
    folder = tmp_path_factory.mktemp("files")
    files, held, number = RolloutFiles(folder), {}, 0
    for added, ended, tokens, killed in steps:
        for _ in range(added):
            rollout = make_rollout(number, tokens)
            add(files, rollout)
            held[number] = rollout
            number += 1
        for task in list(held)[:ended]:
            del held[task]
        places = {task: files.place_of(rollout) for task, rollout in held.items()}
        files.sync()
        files.keep(set(places.values()))
        needed = sum(sum(place[2]) for place in places.values())
        last = [sum(sum(place[2]) for place in places.values() if place[0] == file) for file in map(int, sizes(folder))]
        assert all(last), "no file without a rollout that is needed"
        assert sum(sizes(folder).values()) >= needed
        if killed:
            files.close()
            files = RolloutFiles(folder)
            held = {task: files.read(place) for task, place in places.items()}
        assert [rollout.task for rollout in held.values()] == list(held)
    for _ in range(2):  # with nothing new, two saves give up every file that is hardly needed
        places = {task: files.place_of(rollout) for task, rollout in held.items()}
        files.sync()
        files.keep(set(places.values()))
    needed = sum(sum(place[2]) for place in places.values())
    assert sum(sizes(folder).values()) * NEEDED_SHARE <= needed

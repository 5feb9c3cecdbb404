"""A hub's journal, and the core that a new hub process rebuilds from it."""

from __future__ import annotations

import dataclasses
import resource
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_support import Driver, Source, make_part, make_rollout, make_run, train_one_step

from sgpo_async.errors import HubError
from sgpo_async.hub import HubCore
from sgpo_async.hub import events as ev
from sgpo_async.hub.journal import FILE, Journal
from sgpo_async.hub.recovery import read_event, recover, save, write_event
from sgpo_async.wire import encode
from sgpo_async.wire import records as wire

LEASE = wire.Lease(
    task=3,
    attempt=0,
    purpose="train",
    problem="1 + 1",
    answer="2",
    strategy="Add.",
    verifier="math",
    autonomous=2,
    guided=1,
    seed=0,
    min_version=0,
    temperature=1.0,
    top_p=1.0,
    max_new_tokens=4,
    top_logprobs_num=0,
)


class JournalledDriver(Driver):
    """A driver whose events are written to a journal, as the hub's loop does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.journal = Journal(folder)
        self.core, _ = recover(self.core, self.journal)

    def handle(self, event: ev.Event) -> list[ev.Effect]:
        frames = encode(event.message) if isinstance(event, ev.Received) else []
        write_event(self.journal, event, at=self.now, frames=frames)
        effects = super().handle(event)
        self.journal.commit()
        return effects

    def kill_and_recover(self) -> HubCore:
        """The hub process dies; return the core of the next one."""
        self.journal.close()
        self.journal = Journal(self.folder)
        core, now = recover(HubCore(self.run, Source(), store="/store"), self.journal)
        assert now <= self.now
        return core


def busy_hub(folder: Path, *, saves: bool) -> JournalledDriver:
    """A hub with a trained step, a buffered group, running leases of two actors, and a report of one of them."""
    driver = JournalledDriver(folder)
    driver.learner()
    driver.actor(b"a", credit=2)
    driver.serve_evaluation(b"a")
    train_one_step(driver)
    if saves:
        save(driver.core, driver.journal)
    driver.send(b"a", wire.Ready(tasks=2, version=1))
    driver.actor(b"b", credit=1, version=1)
    first, second = driver.leases(b"a")
    driver.serve(b"a", first)
    driver.send(b"a", make_rollout(second, 1, versions=(1,)))
    driver.send(b"a", progress(second, 0, start=0, tokens=5))
    if saves:
        save(driver.core, driver.journal)
    driver.send(b"a", progress(second, 0, start=5, tokens=2))
    driver.send(b"r0", wire.BatchRequest(step=1))
    driver.advance(1.5)
    return driver


def progress(lease: wire.Lease, slot: int, *, start: int, tokens: int, version: int = 1) -> wire.Progress:
    part = make_part(slot, start, tokens, version)
    return wire.Progress(task=lease.task, attempt=lease.attempt, purpose=lease.purpose, partial=(part,))


@pytest.mark.parametrize("saves", [False, True])
def test_a_recovered_core_has_the_same_state_and_goes_on_in_the_same_way(tmp_path: Path, saves: bool) -> None:
    driver = busy_hub(tmp_path, saves=saves)
    before, log = driver.core, list(driver.log)
    core = driver.kill_and_recover()
    assert core.status() == before.status()
    assert core.run_id == before.run_id
    lost = ev.SenderDown(b"a", "gone")
    for event in (lost, ev.Tick(), ev.Received(b"b", wire.Ready(tasks=3, version=1))):
        assert repr(core.handle(event, 100.0)) == repr(before.handle(event, 100.0))
    assert len(log) == len(driver.log)


def test_a_saved_lease_does_not_hold_its_problem(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=False)
    for lease in driver.core.training.leases.running.values():
        assert lease.terms.problem
        assert "terms" not in lease.__getstate__()
        assert repr(dataclasses.replace(lease).terms) == repr(lease.terms)


def test_an_empty_journal_gives_the_new_core(tmp_path: Path) -> None:
    core = HubCore(make_run(), Source())
    assert recover(core, Journal(tmp_path)) == (core, 0.0)


def test_a_second_restart_finds_what_the_first_one_has_written(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=True)
    driver.core = driver.kill_and_recover()
    driver.handle(ev.HubRestarted())
    driver.advance(1.0)
    assert driver.kill_and_recover().status() == driver.core.status()


def test_what_was_not_committed_is_forgotten_as_a_whole(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=False)
    status = driver.core.status()
    write_event(driver.journal, ev.SenderDown(b"a", "gone"), at=driver.now)
    driver.journal._db.close()  # as kill -9 does
    driver.journal = Journal(tmp_path)
    core, _ = recover(HubCore(driver.run, Source(), store="/store"), driver.journal)
    assert core.status() == status


@pytest.mark.parametrize("changed", ["steps", "release"])
def test_a_journal_of_other_settings_or_another_release_is_emptied(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = busy_hub(tmp_path, saves=True)
    driver.journal.close()
    if changed == "release":
        monkeypatch.setattr("sgpo_async.hub.recovery.__version__", "9.9")
    new = HubCore(replace(driver.run, steps=driver.run.steps + (changed == "steps")), Source())
    journal = Journal(tmp_path)
    assert recover(new, journal) == (new, 0.0)
    assert list(journal.entries()) == []
    assert list(tmp_path.glob("*.rollouts.*")) == []


def test_a_hub_that_was_killed_while_it_ended_ends_after_its_restart(tmp_path: Path) -> None:
    """Otherwise it would handle no event, and live for ever."""
    driver = busy_hub(tmp_path, saves=True)
    driver.send(b"r0", wire.Finish(reason="finished"))
    driver.advance(60.0)
    assert driver.shutdown == "finished"
    core = driver.kill_and_recover()
    assert core.handle(ev.HubRestarted(), driver.now) == [ev.Shutdown("finished")]


def test_the_journal_of_an_interrupted_run_is_emptied(tmp_path: Path) -> None:
    """A second Ctrl-C kills a hub that is ending; the next run of this name begins, and does not end at once."""
    driver = busy_hub(tmp_path, saves=True)
    driver.handle(ev.Interrupted("Ctrl-C"))
    core = driver.kill_and_recover()
    assert core.closing is None and core.training.step == 0
    driver.core = core
    driver.learner()
    save(core, driver.journal)
    assert driver.kill_and_recover().status() == core.status()


def test_an_event_that_the_core_cannot_handle_is_not_replayed(tmp_path: Path) -> None:
    """The loop closes the journal when the core fails; the hub could otherwise never be started again."""
    driver = busy_hub(tmp_path, saves=True)
    status = driver.core.status()
    driver.journal.append(driver.now, b"an event that breaks the core")
    assert driver.kill_and_recover().status() == status


def test_another_address_is_the_same_run(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=True)
    driver.journal.close()
    moved = replace(driver.run, hub=replace(driver.run.hub, address="tcp://127.0.0.1:1234"))
    core, _ = recover(HubCore(moved, Source(), store="/store"), Journal(tmp_path))
    assert core.training.step == 1


def written(folder: Path) -> int:
    """Bytes in the files of rollouts."""
    return sum(path.stat().st_size for path in folder.glob("*.rollouts.*"))


def test_a_save_writes_no_rollout_again_and_deletes_the_files_of_trained_ones(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=True)
    save(driver.core, driver.journal)
    before = written(tmp_path)
    save(driver.core, driver.journal)
    assert written(tmp_path) == before > 0
    driver.send(b"r0", wire.Commit(step=1))
    save(driver.core, driver.journal)
    recovered = driver.kill_and_recover()
    assert recovered.status() == driver.core.status()
    assert 0 < written(tmp_path) < before


def test_rollouts_whose_versions_a_restore_has_shifted_are_saved_again(tmp_path: Path) -> None:
    driver = busy_hub(tmp_path, saves=True)
    driver.send(b"r0", wire.SnapshotRequest(step=1))
    driver.send(b"r0", wire.Restore(state=driver.only(b"r0", wire.Snapshot).state))
    save(driver.core, driver.journal)
    groups = driver.core.training.leases.complete
    assert groups
    recovered = driver.kill_and_recover().training.leases.complete
    versions = {number: group.oldest_version for number, group in groups.items()}
    assert {number: group.oldest_version for number, group in recovered.items()} == versions


@pytest.mark.parametrize(
    "event",
    [
        ev.Received(b"a", wire.Heartbeat(state="serving")),
        ev.Received(b"a", make_rollout(LEASE, 1, versions=(1,))),
        ev.Rejected(b"a", "garbage"),
        ev.Forbidden(b"a", "not the learner"),
        ev.SenderUp(b"a", "::1", 5, b"secret"),
        ev.SenderDown(b"a", "gone"),
        ev.Tick(),
        ev.HubRestarted(),
        ev.Interrupted("signal"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_survive_the_journal(tmp_path: Path, event: ev.Event) -> None:
    journal = Journal(tmp_path)
    write_event(journal, event, at=1.5, frames=encode(event.message) if isinstance(event, ev.Received) else [])
    journal.commit()
    ((at, body),) = journal.entries()
    assert at == 1.5
    assert repr(read_event(body, journal.rollouts)) == repr(event)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_file_of_rollouts_is_one_line(tmp_path: Path, damage: str) -> None:
    driver = busy_hub(tmp_path, saves=True)
    for path in tmp_path.glob("*.rollouts.*"):
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(HubError, match=r"hub\.journal: .*check the disk") as failure:
        driver.kill_and_recover()
    assert "\n" not in str(failure.value)


# ---- the file


def test_only_the_user_can_read_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(0.0, b"event")
    journal.commit()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_removed_journal_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(0.0, b"event")
    journal.remove()
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_two_hubs_cannot_share_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgpo_async.hub.journal._BUSY_S", 0.05)
    Journal(tmp_path).commit()
    with pytest.raises(HubError, match=r"hub\.journal: .*locked; another hub uses it: choose another name=NAME"):
        Journal(tmp_path)


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database " * 100)
    with pytest.raises(HubError, match=r"hub\.journal: file is not a database; delete it to start without it"):
        Journal(tmp_path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    program = f"""
import dataclasses
import resource
from pathlib import Path
from sgpo_async.errors import HubError
from sgpo_async.hub.journal import Journal
journal = Journal(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    for _ in range(100):
        journal.append(0.0, bytes(10_000))
        journal.commit()
except HubError as error:
    print(error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("\n") == 1
    assert "hub.journal: " in done.stdout
    assert done.stdout.endswith("; check the disk and its free space\n")


def test_no_secret_is_in_the_journal(tmp_path: Path) -> None:
    """Who reads it, after a crash, could otherwise act as the learner, or come to sessions that still go on."""
    token, secret = "token-" + "5" * 40, b"secret-" + b"7" * 40
    driver = JournalledDriver(tmp_path)
    driver.send(b"r0", wire.Hello(role="learner", name="r0", token=token))
    driver.send(b"r0", wire.Published(version=0, store="tcp://127.0.0.1:1", secret=secret))
    driver.send(b"a", wire.Hello(role="actor", name="a", serves=True))
    driver.handle(ev.SenderUp(b"a", "127.0.0.1", 4000, secret))
    driver.send(b"a", wire.SenderUp(sender=1, host="127.0.0.1", port=1, secret=secret))
    save(driver.core, driver.journal)
    driver.handle(ev.SenderUp(b"a", "127.0.0.1", 4000, secret))
    assert driver.kill_and_recover().actors.keys() == {b"a"}
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files and not any(token.encode() in data or secret in data for data in files)

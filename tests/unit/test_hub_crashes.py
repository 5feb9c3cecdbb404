"""The protocol as a state machine: leases, acknowledgements, journal, commit, and a crash of the hub at every write.

    rule: something happens to the members      the actions of `test_hub_random.World`, each with what it draws
    rule: the hub crashes k writes from now,    a write: one SQL statement, one operation on a rollout file, or one
          or at the next one of a kind          effect that is carried out; also while it recovers from a crash

As in `hub.loop`, an event is written and handled, the journal is committed if there are effects, and only then are they
carried out. After a crash only what is on disk is left: a new process recovers, all actors come back, and who has had
no answer asks again. At the end of every example the run must be finished without further faults.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from test_hub_random import World

from sgpo_async.hub.core import FAIR_S, RESTART_RETURN_S
from sgpo_async.hub.events import Effect, Event, Received, Send
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.recovery import save, write_event
from sgpo_async.hub.rollout_files import Place, RolloutFiles
from sgpo_async.wire import encode
from sgpo_async.wire import records as wire

EXAMPLES = int(os.environ.get("SGPO_ASYNC_EXAMPLES", "80"))
RULES = 80  # in one example
SAVES = 0.25  # share of the events after which the state is saved
REPEATED = (  # by their senders, until they are answered
    wire.Rollout, wire.BatchRequest, wire.Commit, wire.Published, wire.Evaluate, wire.SnapshotRequest, wire.Restore,
)  # fmt: skip
WRITES = (
    "rollout added", "half of a rollout added", "files synced", "file deleted", "files closed",
    "INSERT INTO entries", "INSERT OR REPLACE INTO facts", "DELETE FROM entries", "COMMIT", "BEGIN", "effect",
)  # fmt: skip


ACTIONS = [name for name, weight in World.ACTIONS for _ in range(max(1, round(weight / 4)))]
CRASHES = 30  # at each kind of write, whatever hypothesis chooses


class Crash(BaseException):
    """kill -9."""


class Writes:
    """Counts the writes of all processes of a hub, and crashes before a planned one."""

    def __init__(self) -> None:
        # How many writes until the next crash, or at which kind of write it is; then to each crash after it.
        self.plan: list[int | str] = []
        self.crashes: Counter[str] = Counter()

    def __call__(self, what: str) -> None:
        match self.plan:
            case []:
                return
            case [str(kind), *_] if kind != what:
                return
            case [int(left), *_] if left:
                self.plan[0] = left - 1
                return
        del self.plan[0]
        self.crashes[what] += 1
        raise Crash(what)


class Database:
    """An SQLite connection, each of whose statements is a write."""

    def __init__(self, connection: Any, write: Writes) -> None:
        self.connection, self.write = connection, write

    def execute(self, sql: str, *values: Any) -> Any:
        self._count(sql)
        return self.connection.execute(sql, *values)

    def executemany(self, sql: str, rows: Any) -> Any:
        self._count(sql)
        return self.connection.executemany(sql, rows)

    def _count(self, sql: str) -> None:
        for statement in WRITES:
            if sql.startswith(statement):
                self.write(statement)

    def close(self) -> None:
        self.connection.close()


class File(type(Path())):  # type: ignore[misc]
    """The path of a rollout file, whose deletion is a write."""

    write: Writes

    def unlink(self, missing_ok: bool = False) -> None:
        self.write("file deleted")
        super().unlink(missing_ok)


class Files(RolloutFiles):
    """Rollout files, each of whose operations is a write; a rollout may be written in part."""

    def __init__(self, folder: Path, write: Writes) -> None:
        self.write = write
        super().__init__(folder)

    def add(self, rollout: wire.Rollout, frames: Any) -> Place:
        self.write("rollout added")
        try:
            self.write("half of a rollout added")
        except Crash:
            (self._file or self._begin()).write(frames[0][: len(frames[0]) // 2])
            self._file.flush()
            raise
        return super().add(rollout, frames)

    def sync(self) -> None:
        self.write("files synced")
        super().sync()

    def keep(self, places: Any) -> None:
        self.write("files closed")
        super().keep(places)

    def _path(self, number: int) -> Path:
        path = File(super()._path(number))
        path.write = self.write
        return path

    def die(self) -> None:
        """What Python has not given to the system is lost."""
        if self._file:
            self._file.raw.close()


def crashing_journal(folder: Path, write: Writes) -> Journal:
    journal = Journal(folder)
    journal.rollouts = Files(folder, write)
    journal._db = Database(journal._db, write)
    return journal


class CrashingWorld(World):
    """A world whose hub may crash at every write."""

    def __init__(self, rng: Random, **shape: Any) -> None:
        self.write = Writes()
        super().__init__(rng, **shape)
        self.journal.close()
        self.journal = crashing_journal(Path(self.folder.name), self.write)
        self.saves_at, self.saves = Random(0), SAVES

    def handle(self, event: Event) -> list[Effect]:
        rank = event.member if isinstance(event, Received) and event.member.startswith(b"rank") else None
        before = len(self.inbox[rank]) if rank else 0
        try:
            return self.step(event)
        except Crash:
            if rank:
                del self.inbox[rank][before:]  # the answer was lost with the connection
            self.recover()
            repeated = isinstance(event, Received) and isinstance(event.message, REPEATED)
            joins = rank and isinstance(event.message, wire.Hello)
            return self.handle(event) if repeated or joins else []

    def step(self, event: Event) -> list[Effect]:
        """As `hub.loop` does it."""
        frames = encode(event.message) if isinstance(event, Received) else []
        write_event(self.journal, event, at=self.now, frames=frames)
        effects = super(World, self).handle(event)
        if self.saves_at.random() < self.saves:
            self.journal.commit()
            save(self.core, self.journal)
        late = self.core.now - self.core.published_at > FAIR_S
        if isinstance(event, Received) and isinstance(event.message, wire.Rollout) and late and not self.core.closing:
            self.check_rules_are_applied()
        return effects

    def deliver(self, effects: list[Effect]) -> None:
        if effects:
            self.journal.commit()
        for effect in effects:
            if isinstance(effect, Send):
                self.write("effect")
            super().deliver([effect])

    def recover(self) -> None:
        """A new process takes over; it may crash, too."""
        while True:
            self.journal.rollouts.die()
            self.journal._db.close()
            try:
                self.journal = crashing_journal(Path(self.folder.name), self.write)
                self.restart_hub()
                return
            except Crash:
                continue

    def kill_hub(self) -> None:
        """Between two writes of its own choice."""
        self.recover()

    def finish(self) -> None:
        """First the hub gives up those whose last word was lost in a crash."""
        self.saves = 0.0
        self.advance(RESTART_RETURN_S + 1)
        super().finish()

    def check_lost(self, silent: list[bytes]) -> None:
        """After a crash meanwhile, the hub waits longer for them."""


class Protocol(RuleBasedStateMachine):
    """One history; hypothesis shrinks it to the fewest rules that show a fault."""

    crashes: ClassVar[Counter[str]] = Counter()
    examples = rules = 0

    def __init__(self) -> None:
        super().__init__()
        self.world: CrashingWorld | None = None

    @initialize(
        batch=st.integers(2, 3),
        max_lag=st.integers(0, 2),
        ranks=st.integers(1, 2),
        parts=st.integers(1, 2),
        stale=st.sampled_from(["drop", "mask", "correct"]),
    )
    def begin(self, **shape: Any) -> None:
        self.world = CrashingWorld(Random(0), **shape)
        self.world.start_learner()
        self.world.new_actor()
        self.world.check_inboxes()  # as after every rule: the first rule may forget what was granted
        Protocol.examples += 1

    @rule(action=st.sampled_from(ACTIONS), draw=st.integers(0, 2**16))
    def something_happens(self, action: str, draw: int) -> None:
        assert self.world
        Protocol.rules += 1
        self.world.rng = Random(draw)
        getattr(self.world, action)()
        self.world.check_inboxes()

    @precondition(lambda self: not self.world.write.plan)
    @rule(writes=st.lists(st.integers(0, 15) | st.sampled_from(WRITES), min_size=1, max_size=3))
    def the_hub_crashes(self, writes: list[int | str]) -> None:
        assert self.world
        self.world.write.plan = list(writes)

    def teardown(self) -> None:
        if self.world is None:
            return
        world = self.world
        Protocol.crashes += world.write.crashes
        world.write.plan = []
        try:
            world.finish()
            ledger = world.core.status()["ledger"]
            tasks = world.run.steps * world.run.learner.problems_per_step
            assert (ledger["trained"], ledger["in_flight"], ledger["buffered"]) == (tasks, 0, 0)
            assert ledger["dispatched"] == tasks + sum(ledger["dropped"].values())
        finally:
            world.close()


@pytest.mark.timeout(900)
def test_a_crash_at_any_write_loses_nothing_that_was_told() -> None:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=EXAMPLES, stateful_step_count=RULES, deadline=None, suppress_health_check=health)
    run_state_machine_as_test(Protocol, settings=limits)
    crashes = ", ".join(f"{what}: {count}" for what, count in sorted(Protocol.crashes.items()))
    print(
        f"{Protocol.examples} interleavings of {Protocol.rules} actions, {Protocol.crashes.total()} crashes: {crashes}"
    )


@pytest.mark.parametrize("what", WRITES)
def test_a_crash_at_each_kind_of_write_loses_nothing_that_was_told(what: str) -> None:
    """Histories of fixed draws, so that no kind is left out by chance."""
    rng, survived = Random(what), 0
    for number in range(200):
        protocol = Protocol()
        protocol.begin(batch=2 + number % 2, max_lag=number % 3, ranks=2, parts=1, stale="drop")
        world = protocol.world
        assert world
        for _ in range(RULES):
            world.write.plan = world.write.plan or [what]
            protocol.something_happens(rng.choice(ACTIONS), rng.randrange(2**16))
        protocol.teardown()
        survived += world.write.crashes[what]
        if survived >= CRASHES:
            return
    raise AssertionError(f"{survived} crashes at {what}")

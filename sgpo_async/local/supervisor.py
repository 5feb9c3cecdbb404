"""When each process of a run starts, and what happens when it ends.

    hub ──hub.json: address──▶ learner, actors          (started)
    learner ends with 0 ──▶ hub and actors have LEAVING_S to follow ──▶ done
    learner ends otherwise, or hub ends before it with an error ──▶ RunFailed, with the error from its log
    actor crashes ──▶ started again after 1, 2, 4, ... s, RESTARTS times;  all have failed ──▶ RunFailed
    actor ends with an error of the user's (2) ──▶ once more, since a second try seldom mends it
    hub ends with 0, or all actors have left with 0 ──▶ the learner has LAST_S to end, too

`tick` checks and acts but never waits, so its caller can stop between any two ticks, also during start-up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.local.children import Child, Processes
from sgpo_async.local.run_folder import read_hub_file
from sgpo_async.processes.signals import Signals

HUB_START_S = 60.0
LEAVING_S = 20.0  # for actors and hub to end by themselves after the learner has ended
LAST_S = 120.0  # for the learner to write its last checkpoint after the hub or all actors have ended
RESTARTS = 5
USERS_ERROR = 2  # exit code, see `sgpo_async.cli.main`
TICK_S = 0.25


class CommandLines(Protocol):
    """The command lines of a run."""

    @property
    def actors(self) -> int:
        """The number of actors."""

    def hub(self) -> Sequence[str]:
        """The command of the hub, which writes hub.json into the run's folder when it is ready."""

    def learner(self, address: str) -> Sequence[str]:
        """The command of the learner, with all its ranks."""

    def actor(self, name: str, address: str) -> Sequence[str]:
        """The command of one actor."""


@dataclass
class ActorSlot:
    """One actor of the run; a new process takes the slot after a crash."""

    number: int
    child: Child | None = None
    crashes: int = 0
    start_at: float = 0.0  # the time of its next start
    state: str = "starting"  # starting, started, restarting, left, failed

    @property
    def name(self) -> str:
        """Unique for every start: the hub may not yet know that the previous process is dead."""
        return f"actor-{self.number}" + (f".{self.crashes}" if self.crashes else "")


class Supervisor:
    """Runs the command lines of a run to its end. Read `phase`, `slots` and `notes` between ticks."""

    def __init__(self, plan: CommandLines, processes: Processes) -> None:
        self.plan = plan
        self.phase = "starting the hub"
        self.address = ""
        self.slots = [ActorSlot(number) for number in range(plan.actors)]
        self.notes: list[str] = []  # events that the user should know, in order
        self._processes = processes
        self._hub = processes.start("hub", plan.hub())
        self._hub_deadline = time.monotonic() + HUB_START_S
        self._learner: Child | None = None
        self._learner_deadline: float | None = None
        self._leaving_until: float | None = None

    @property
    def done(self) -> bool:
        """Whether the learner has trained all steps and the others have ended, or had LEAVING_S to end."""
        if self._leaving_until is None:
            return False
        gone = self._hub.code is not None and all(slot.child is None for slot in self.slots)
        return gone or time.monotonic() > self._leaving_until

    def tick(self) -> None:
        """Check every process and act on its state.

        Raises RunFailed or DeadlineExceeded when the run cannot go on.
        """
        if self._learner is None:
            self._await_hub()
            return
        if self._learner.code == 0 and self._leaving_until is None:
            self.phase = "finishing"
            self._leaving_until = time.monotonic() + LEAVING_S
        if self._leaving_until is None:
            self._look_at_hub()  # before the learner, which fails as well when the hub is gone
            self._look_at_learner(self._learner)
        for slot in self.slots:
            self._look_at_actor(slot)
        states = {slot.state for slot in self.slots}
        if states == {"failed"} and self._leaving_until is None:
            raise RunFailed(f"no actor is left; the last event: {self.notes[-1]}")
        if states <= {"left", "failed"}:
            self._expect_end()

    def _await_hub(self) -> None:
        if self._hub.code is not None:
            raise RunFailed(f"the hub {self._hub.ending()}: {self._hub.complaint()}")
        known = read_hub_file(self._processes.folder)
        if known.get("pid") == self._hub.process.pid:
            self.address = known["address"]
            self.phase = "starting the learner and the actors"
            self._learner = self._processes.start("learner", self.plan.learner(self.address))
        elif time.monotonic() > self._hub_deadline:
            raise DeadlineExceeded("local: the hub", "hub.json", HUB_START_S)

    def _look_at_learner(self, learner: Child) -> None:
        if learner.code is not None:
            raise RunFailed(f"the learner {learner.ending()}: {learner.complaint()}")
        if self._learner_deadline is not None and time.monotonic() > self._learner_deadline:
            raise DeadlineExceeded("local: the learner", "end after the hub's or the actors'", LAST_S)

    def _look_at_hub(self) -> None:
        if self._hub.code is None:
            return
        if self._hub.code != 0:
            raise RunFailed(f"the hub {self._hub.ending()}: {self._hub.complaint()}")
        self._expect_end()

    def _expect_end(self) -> None:
        """The hub has ended or all actors have: the learner must end soon, too."""
        if self._learner_deadline is None:
            self.phase = "finishing"
            self._learner_deadline = time.monotonic() + LAST_S

    def _look_at_actor(self, slot: ActorSlot) -> None:
        if slot.child is None:
            if slot.state in ("starting", "restarting") and not self._finishing and time.monotonic() >= slot.start_at:
                slot.child = self._processes.start(slot.name, self.plan.actor(slot.name, self.address))
                slot.state = "started"
            return
        code = slot.child.code
        if code is None:
            return
        child, slot.child = slot.child, None
        if code == 0 or self._finishing:
            slot.state = "left"
            self.notes += [] if self._finishing else [f"{child.name} has left"]
        else:
            self._crashed(slot, child)

    def _crashed(self, slot: ActorSlot, child: Child) -> None:
        slot.crashes += 1
        what = f"{child.name} {child.ending()}"
        restarts = 1 if child.code == USERS_ERROR else RESTARTS
        if slot.crashes > restarts:
            slot.state = "failed"
            self.notes.append(f"{what}, not started again after {slot.crashes - 1} restarts: {child.complaint()}")
            return
        pause = 2.0 ** (slot.crashes - 1)
        slot.state = "restarting"
        slot.start_at = time.monotonic() + pause
        self.notes.append(f"{what}, starts again in {pause:g} s (see {child.log})")

    @property
    def _finishing(self) -> bool:
        return self.phase == "finishing"


class Observer(Protocol):
    """Shows the run (see `sgpo_async.local.show`)."""

    def update(self, supervisor: Supervisor) -> None:
        """Called after each tick."""

    def close(self, *, stopping: bool) -> None:
        """Called before the processes are ended."""


def supervise(plan: CommandLines, folder: Path, observer: Observer) -> int:
    """Start everything, show it, end everything; returns 0, or 128 + the signal that ended it.

    Raises RunFailed or DeadlineExceeded if the run cannot go on.
    """
    with Signals() as signals, ExitStack() as stack:
        processes = Processes(folder)
        stack.callback(processes.stop, hurry=lambda: signals.kill)
        stack.callback(lambda: observer.close(stopping=signals.stop))
        supervisor = Supervisor(plan, processes)
        while not supervisor.done and not signals.stop:
            supervisor.tick()
            observer.update(supervisor)
            signals.wait(TICK_S)
    return signals.exit_code if signals.stop else 0

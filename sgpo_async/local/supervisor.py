"""When each process of a run starts, and what happens when it ends.

    hub ──hub.json: address──▶ learner, actors          (started)
    learner ends with 0 ──▶ hub and actors have LEAVING_S to follow ──▶ done
    learner ends otherwise ──▶ RunFailed, with the error from its log
    hub or actor crashes ──▶ started again, see `restarts`;  the hub or all actors have failed for good ──▶ RunFailed
    hub or actor ends with code 2 (a permanent error) ──▶ RunFailed;  actor with 3 (may pass) ──▶ started again once
    hub ends with 0 ──▶ the learner has LAST_S to end, too
    all actors have left or failed ──▶ a note; the learner waits learner.batch_timeout_s for others

`tick` checks and acts but never waits, so its caller can stop between any two ticks, also during start-up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.local.children import Child, Processes
from sgpo_async.local.hub_process import TICK_S, USERS_ERROR, HubProcess
from sgpo_async.local.restarts import LIMIT, WINDOW_S, Restarts
from sgpo_async.local.run_folder import forget_journal, summary_written
from sgpo_async.processes.signals import Signals
from sgpo_async.processes.torchrun import shutdown_timeout_s

MAY_PASS = 3  # exit code of an actor whose error may pass
LEAVING_S = 20.0  # for actors and hub to end by themselves after the learner has ended
LAST_S = 120.0  # for the learner to end after the hub
REPORT_S = 10.0  # for torchrun to end after its ranks, or after it has killed them


class CommandLines(Protocol):
    """The command lines of a run."""

    @property
    def actors(self) -> int:
        """The number of actors."""

    @property
    def batch_timeout_s(self) -> float:
        """How long the learner waits for a batch before it gives up."""

    def hub(self, address: str) -> Sequence[str]:
        """The command of the hub, which writes hub.json into the run's folder when it is ready.

        `address` is the address at which it listened before a crash; empty at its first start.
        """

    def learner(self, address: str) -> Sequence[str]:
        """The command of the learner, with all its ranks."""

    def actor(self, name: str, address: str) -> Sequence[str]:
        """The command of one actor."""


@dataclass
class ActorSlot:
    """One actor of the run; a new process takes the slot after a crash."""

    number: int
    child: Child | None = None
    restarts: Restarts = field(default_factory=Restarts)
    start_at: float = 0.0  # the time of its next start
    state: str = "starting"  # starting, started, restarting, left, failed

    @property
    def name(self) -> str:
        """Unique for every start: the hub may not yet know that the previous process is dead."""
        return f"actor-{self.number}" + (f".{self.restarts.crashes}" if self.restarts.crashes else "")


class Supervisor:
    """Runs the command lines of a run to its end. Read `phase`, `slots` and `notes` between ticks."""

    def __init__(self, plan: CommandLines, processes: Processes) -> None:
        self.plan = plan
        self.phase = "starting the hub"
        self.slots = [ActorSlot(number) for number in range(plan.actors)]
        self.notes: list[str] = []  # events that the user should know, in order
        self._processes = processes
        self._began = time.time()
        self._hub = HubProcess(processes, plan.hub, note=self.notes.append)
        self._learner: Child | None = None
        self._learner_deadline: float | None = None
        self._leaving_until: float | None = None
        self._alone = False  # the user was told that no actor is left
        self._stalled = False  # the user was told that the run makes no progress

    @property
    def address(self) -> str:
        """The hub's address; empty until the hub is ready."""
        return self._hub.address

    @property
    def done(self) -> bool:
        """Whether the learner has trained all steps and the others have ended, or had LEAVING_S to end."""
        if self._leaving_until is None:
            return False
        hub = self._hub.child
        gone = (hub is None or hub.code is not None) and all(slot.child is None for slot in self.slots)
        return gone or time.monotonic() > self._leaving_until

    def tick(self) -> None:
        """Check every process and act on its state.

        Raises RunFailed or DeadlineExceeded when the run cannot go on.
        """
        learner = self._learner
        if learner is None:
            self._await_hub()
            return
        if learner.code == 0 and self._leaving_until is None:
            self.phase = "finishing"
            self._leaving_until = time.monotonic() + LEAVING_S
        if self._leaving_until is None:
            self._hub.tick()  # before the learner, which may fail when the hub is gone
            self._look_at_learner(learner)
        for slot in self.slots:
            self._look_at_actor(slot)
        self._look_at_actors()

    def note_stall(self, reason: str) -> None:
        """Note why the run makes no progress, as the hub says, and have all processes log their stacks, once."""
        if reason and not self._stalled:
            asked = self._processes.request_stacks()
            self.notes.append(f"{reason}; the stacks of {len(asked)} processes are in {self._processes.folder}/logs")
        self._stalled = bool(reason)

    def stop_learner(self, seconds: float) -> bool:
        """Have the learner write a checkpoint and end. Returns whether it will: it runs, and so does the hub."""
        hub, learner = self._hub.child, self._learner
        if hub is None or hub.code is not None or learner is None or learner.code is not None:
            return False
        self.phase = "stopping"
        self.notes.append(
            f"waiting up to {seconds:g} s for the learner, which finishes its step and writes a checkpoint; "
            "press Ctrl-C to stop at once"
        )
        learner.process.terminate()
        return True

    @property
    def learner_runs(self) -> bool:
        """Whether the learner has been started and has not ended."""
        return self._learner is not None and self._learner.code is None

    def _await_hub(self) -> None:
        self._hub.tick()
        if self.address:
            self.phase = "starting the learner and the actors"
            self._learner = self._processes.start("learner", self.plan.learner(self.address))

    def _look_at_learner(self, learner: Child) -> None:
        if learner.code:  # 0 is seen by the next tick
            when = "after a crash of the hub, " if self._hub.child is None else ""
            raise RunFailed(f"{when}the learner {learner.ending()}: {learner.complaint()}")
        if self._learner_deadline is None and (self._hub.finished or self._trained):
            self.phase = "finishing"
            self._learner_deadline = time.monotonic() + LAST_S
        if self._learner_deadline is not None and time.monotonic() > self._learner_deadline:
            raise DeadlineExceeded("local: the learner", "end after the hub's", LAST_S)

    def _look_at_actors(self) -> None:
        """If no actor is left: fail if all have failed; otherwise tell the user, because others may join."""
        states = {slot.state for slot in self.slots}
        if self._alone or self._finishing or not states <= {"left", "failed"}:
            return
        if states == {"failed"}:
            raise RunFailed(f"no actor is left; the last event: {self.notes[-1]}")
        self._alone = True
        patience = f"{self.plan.batch_timeout_s:g} s for a batch (learner.batch_timeout_s)"
        self.notes.append(
            f"no actor is left: the learner waits {patience}; "
            f"to go on, start one with: sgpo-async actor --hub {self.address}"
        )

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
        what = f"{child.name} {child.ending()}"
        if child.code == USERS_ERROR:
            raise RunFailed(f"{what}: {child.complaint()}")
        limit = 1 if child.code == MAY_PASS else LIMIT
        pause = slot.restarts.pause_after_crash(time.monotonic(), limit=limit)
        if pause is None:
            slot.state = "failed"
            times = f"after {limit} restart{'s' * (limit > 1)} within {WINDOW_S / 60:g} minutes"
            self.notes.append(f"{what}, not started again {times}: {child.complaint()}")
            return
        slot.state = "restarting"
        slot.start_at = time.monotonic() + pause
        self.notes.append(f"{what}, starts again in {pause:g} s (see {child.log})")

    @property
    def _trained(self) -> bool:
        """Whether the learner has trained all steps; after that, hub and actors leave."""
        return summary_written(self._processes.folder, self._began)

    @property
    def _finishing(self) -> bool:
        return self.phase == "finishing"


class Observer(Protocol):
    """Shows the run (see `sgpo_async.local.show`)."""

    @property
    def stalled(self) -> str:
        """The hub's reason why the run makes no progress; empty if it does."""

    def update(self, supervisor: Supervisor) -> None:
        """Called after each tick."""

    def close(self, *, stopping: bool) -> None:
        """Called before the processes are ended."""


def supervise(plan: CommandLines, folder: Path, observer: Observer, *, checkpoint_s: float | None = None) -> int:
    """Start everything, show it, end everything; returns 0, or 128 + the signal that ended it.

    If the run is stopped or fails, the learner has `checkpoint_s` to write a checkpoint before everything ends; by
    default a little longer than torchrun gives its ranks.

    Raises RunFailed or DeadlineExceeded if the run cannot go on, ConfigError if torchrun's timeout is no number.
    """
    if checkpoint_s is None:
        checkpoint_s = shutdown_timeout_s() + REPORT_S
    with Signals() as signals, ExitStack() as stack:
        processes = Processes(folder)
        stack.callback(processes.stop, hurry=lambda: signals.kill)
        stack.callback(lambda: observer.close(stopping=signals.stop))
        supervisor = Supervisor(plan, processes)
        stack.callback(_await_checkpoint, supervisor, observer, signals, checkpoint_s)
        while not supervisor.done and not signals.stop:
            supervisor.tick()
            observer.update(supervisor)
            supervisor.note_stall(observer.stalled)
            signals.wait(TICK_S)
    if supervisor.done:
        forget_journal(folder)  # left by a hub that crashed after the learner's end
    return signals.exit_code if signals.stop else 0


def _await_checkpoint(supervisor: Supervisor, observer: Observer, signals: Signals, seconds: float) -> None:
    """Let the learner write its checkpoint, up to `seconds` or a second signal, unless it has trained all steps."""
    deadline = time.monotonic() + seconds
    if supervisor.done or not supervisor.stop_learner(seconds):
        return
    while supervisor.learner_runs and not signals.kill and time.monotonic() < deadline:
        observer.update(supervisor)
        signals.wait(TICK_S)

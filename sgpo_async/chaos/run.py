"""A run under faults: starts its processes, starts again what has ended, injects the faults, audits.

    hub ─ address ─▶ relay ─▶ learner (torchrun, which restarts the ranks), actors
    every TICK_S:  start what has ended ─▶ read new metrics ─▶ end faults, begin faults ─▶ note what has recovered

What is started again is what a user or a supervisor would start again, by the same commands: the hub with its command
line, torchrun with learner.resume=true, an actor under a new name. Unlike the supervisor of `sgpo-async local`, this
one never gives up on a process that crashes often, as long as the run goes on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from sgpo_async.chaos import processes
from sgpo_async.chaos.proxy import Relay
from sgpo_async.chaos.recording import SLOW
from sgpo_async.chaos.schedule import ON_CONNECTIONS, ON_MESSAGES, Fault
from sgpo_async.config import Run, to_yaml
from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.files import write_whole
from sgpo_async.local.children import Child, Processes, python, wait_for
from sgpo_async.local.run_folder import newest_checkpoint, read_hub_file
from sgpo_async.metrics.reader import MetricsTail
from sgpo_async.processes.torchrun import torchrun

TICK_S = 0.05
START_S = 120.0  # for the hub, on a busy machine
PAUSE_S = 0.5  # between the end of a process and its next start
FAILED_S = 5.0  # ... if it ended by itself, with an error
STUCK_S = 600.0  # without a step, after which the run has failed
FIND_S = 15.0  # for a process of the kind to appear
LEAVING_S = 60.0  # for hub and actors to end after the learner


class Ending(Protocol):
    """A fault that lasts. Equal ones are the same fault of the same process."""

    def end(self) -> None:
        """End the fault."""


def end_over(lasting: list[tuple[float, Ending]], now: float) -> list[tuple[float, Ending]]:
    """End the faults whose time is over, and return the others. Where equal ones overlap, only the last one ends it."""
    left = [(until, fault) for until, fault in lasting if until > now]
    still = [fault for _, fault in left]
    for until, fault in lasting:
        if until <= now and fault not in still:
            fault.end()
    return left


@dataclass
class FaultRecord:
    """A fault that has happened, and how the run took it."""

    fault: Fault
    at: float  # seconds since the start
    step: int  # the furthest step of the run until then
    recovered_s: float | None = None  # until the run was further, or had ended as it should; None: not yet
    missed: bool = False  # there was no process of this kind, or the run had ended
    hits: int | None = None  # messages that it has hit

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        fault = self.fault
        return {
            "number": fault.number,
            "kind": fault.kind,
            "step": self.step,
            "at_s": round(self.at, 2),
            "seconds": round(fault.seconds, 2),
            "recovered_s": None if self.recovered_s is None else round(self.recovered_s, 2),
            "missed": self.missed,
            "messages": self.hits,
        }


@dataclass
class ProcessSlot:
    """One process at a time: the next one is started when it has ended."""

    name: str
    command: Callable[[int], list[str]]  # by the number of earlier processes
    child: Child | None = None
    starts: int = 0
    start_at: float = 0.0
    ends: list[str] = field(default_factory=list)  # how the earlier ones ended


class ChaosRun:
    """One run under the faults of a schedule."""

    def __init__(self, run: Run, faults: list[Fault], folder: Path) -> None:
        """`folder` holds the configuration; the run writes to its own folder."""
        self.run, self.config = run, folder / "chaos.yaml"
        write_whole(self.config, to_yaml(run))
        self.records: list[FaultRecord] = []
        self._processes = Processes(Path(run.folder))
        self._hub = ProcessSlot("hub", self._hub_command)
        self._learner = ProcessSlot("learner", self._learner_command)
        self._actors = [ProcessSlot(f"actor-{n}", self._actor_command(f"actor-{n}")) for n in range(run.local.actors)]
        self._relay: Relay | None = None
        self._address = ""
        self._tail = MetricsTail(run.folder)
        self._furthest, self._stepped_at = 0, time.monotonic()
        self._began = time.monotonic()
        self._waiting = list(faults)
        self._due: list[tuple[float, Fault]] = []
        self._lasting: list[tuple[float, Ending]] = []

    # ---- the processes

    def _hub_command(self, _: int) -> list[str]:
        same = [f"hub.address={self._address}"] if self._address else []
        return python("sgpo_async.chaos.recording", str(self.config), *same)

    def _learner_command(self, earlier: int) -> list[str]:
        assert self._relay
        ranks = [*torchrun(self.run.local.ranks), f"--max-restarts={len(self.records) + len(self._waiting) + 10}"]
        resume = earlier and newest_checkpoint(Path(self.run.folder, "checkpoints")) is not None
        words = ["-m", "sgpo_async.cli", "learner", str(self.config), "--hub", self._relay.address("learner")]
        return [*ranks, "--monitor-interval=0.1", *words, *(["learner.resume=true"] if resume else [])]

    def _actor_command(self, slot: str) -> Callable[[int], list[str]]:
        def command(earlier: int) -> list[str]:
            assert self._relay
            name = f"{slot}.{earlier}" if earlier else slot
            return python("sgpo_async.cli", "actor", "--hub", self._relay.address(slot), "--name", name)

        return command

    @property
    def _slots(self) -> list[ProcessSlot]:
        return [self._hub, self._learner, *self._actors]

    def _keep(self, slot: ProcessSlot) -> None:
        """Start a process that has ended, after a pause."""
        now = time.monotonic()
        child = slot.child
        if child is None:
            if now >= slot.start_at:
                name = f"{slot.name}.{slot.starts}" if slot.starts else slot.name
                slot.child = self._processes.start(name, slot.command(slot.starts))
                slot.starts += 1
            return
        code = child.code
        if code is None:
            return
        self._look()  # now all of its metrics are there
        if code != 0 or self._furthest < self.run.steps:
            slot.ends.append(f"{child.ending()}: {child.complaint(1)}" if code > 0 else child.ending())
            slot.child, slot.start_at = None, now + (FAILED_S if code > 0 else PAUSE_S)

    # ---- the run

    def run_to_end(self) -> None:
        """Run until the learner has trained all steps. Raises RunFailed or DeadlineExceeded if it does not."""
        try:
            self._start_hub()
            self._relay = Relay(self._address)
            while self._learner.child is None or self._learner.child.code != 0:
                self._tick()
                time.sleep(TICK_S)
            self._finish()
            self._end_faults(math.inf)  # a process that is still stopped could not end
            for slot in (self._hub, *self._actors):
                if slot.child and not wait_for(slot.child, LEAVING_S):
                    slot.ends.append(f"still ran {LEAVING_S:g} s after the learner had ended")
        finally:
            self._end_faults(math.inf)
            self._processes.stop()
            if self._relay:
                self._relay.close()

    def _start_hub(self) -> None:
        self._keep(self._hub)
        deadline = time.monotonic() + START_S
        while not (known := read_hub_file(Path(self.run.folder))):
            assert self._hub.child
            if self._hub.child.code is not None:
                raise RunFailed(f"the hub {self._hub.child.ending()}: {self._hub.child.complaint()}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded("chaos", "start of the hub", START_S)
            time.sleep(TICK_S)
        self._address = known["address"]

    def _tick(self) -> None:
        for slot in self._slots:
            self._keep(slot)
        self._look()
        if self._relay:
            self._relay.check()
        now = time.monotonic()
        self._end_faults(now)
        while self._waiting and self._waiting[0].step <= self._furthest:
            fault = self._waiting.pop(0)
            self._due.append((now + fault.after_s, fault))
        for due in [due for due in self._due if due[0] <= now]:
            if self._begin(due[1]):
                self._due.remove(due)
            elif now > due[0] + FIND_S:
                self._due.remove(due)
                self._note(due[1], missed=True)
        if now - self._stepped_at > STUCK_S:
            raise RunFailed(f"chaos: no step after step {self._furthest} for {STUCK_S:g} s; {self._state()}")

    def _look(self) -> None:
        """Read what the run has written, and note which faults it has overcome."""
        steps = [line["step"] for line in self._tail.poll()]
        now = time.monotonic()
        if steps and max(steps) > self._furthest:
            self._furthest, self._stepped_at = max(steps), now
            for one in self.records:
                if one.recovered_s is None and self._furthest > one.step:
                    one.recovered_s = now - self._began - one.at

    def _finish(self) -> None:
        """The run has ended as it should: it has overcome what has happened, and was too fast for all other faults."""
        self._look()
        for one in self.records:
            if one.recovered_s is None:
                one.recovered_s = time.monotonic() - self._began - one.at
        for fault in [*(due for _, due in self._due), *self._waiting]:
            self._note(fault, missed=True)

    def _state(self) -> str:
        last = self.records[-1].fault if self.records else None
        return f"the last fault: {last}; logs in {self.run.folder}/logs"

    # ---- faults

    def _begin(self, fault: Fault) -> bool:
        """Have a fault happen; False if there is no process of its kind yet."""
        if fault.action in ON_MESSAGES or fault.action in ON_CONNECTIONS:
            assert self._relay
            name = "learner" if fault.target == "learner" else self._pick(fault, self._actors).name
            self._note(fault)
            self._relay.inject(fault, name)
            return True
        found = self._processes_of(fault)
        if not found:
            return False
        try:
            self._strike(fault, found)
        except psutil.Error:  # it has just ended
            return False
        self._note(fault)
        return True

    def _end_faults(self, now: float) -> None:
        self._lasting = end_over(self._lasting, now)

    def _strike(self, fault: Fault, found: list[psutil.Process]) -> None:
        process = self._pick(fault, found)
        lasting: Ending | None = None
        match fault.action:
            case "kill":
                processes.kill(found if fault.target == "learner" else [process])
            case "stop":
                lasting = processes.Suspension.begin(process)
            case "full disk":
                lasting = processes.FullDisk.begin(process)
            case "slow disk":
                lasting = SlowDisk.begin(Path(self.run.folder), fault.seconds / 10)
        if lasting:
            self._lasting.append((time.monotonic() + fault.seconds, lasting))

    def _processes_of(self, fault: Fault) -> list[psutil.Process]:
        """The living processes of the fault's kind; for the learner, all of its processes."""
        if fault.target in processes.MODULES:
            return processes.running(processes.MODULES[fault.target], self._processes.mark)
        if fault.target in ("learner", "rank"):
            child = self._learner.child
            if child is None or child.code is not None:
                return []
            ranks = processes.ranks_of(child.process.pid)
            whole = len(ranks) == self.run.local.ranks
            if fault.target == "rank":
                return ranks
            return processes.with_children(child.process.pid) if whole else []
        slots = [self._hub] if fault.target == "hub" else self._actors
        children = [slot.child for slot in slots if slot.child and slot.child.code is None]
        return [psutil.Process(child.process.pid) for child in children]

    @staticmethod
    def _pick(fault: Fault, among: list[Any]) -> Any:
        return among[int(fault.pick * len(among))]

    def _note(self, fault: Fault, *, missed: bool = False) -> None:
        at = time.monotonic() - self._began
        self.records.append(FaultRecord(fault, at, self._furthest, missed=missed))
        text = f"step {self._furthest:4}  {at:7.1f} s  {'(missed) ' if missed else ''}{fault.kind}"
        print(text, file=sys.stderr, flush=True)

    # ---- afterwards

    def plain(self) -> dict[str, Any]:
        """What has happened, as JSON."""
        for one in self.records:
            if one.fault.action in ON_MESSAGES and self._relay:
                one.hits = self._relay.hits(one.fault)
        return {
            "wall_s": round(time.monotonic() - self._began, 1),
            "starts": {slot.name: slot.starts for slot in self._slots},
            "ends": {slot.name: slot.ends for slot in self._slots},
            "faults": [one.plain() for one in self.records],
        }


@dataclass(frozen=True)
class SlowDisk:
    """Every commit of the hub's journal takes some time longer, until `end`."""

    file: Path

    @classmethod
    def begin(cls, folder: Path, seconds: float) -> SlowDisk:
        """`seconds` is what a commit takes."""
        write_whole(folder / SLOW, str(seconds))
        return cls(folder / SLOW)

    def end(self) -> None:
        """The disk is as fast as before."""
        self.file.unlink(missing_ok=True)

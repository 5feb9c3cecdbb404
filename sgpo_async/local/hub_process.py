"""The hub of a run: after a crash it is started again at the same address.

    HubProcess    acts in `tick` and never waits, for a loop that checks other processes as well (supervisor)
    kept_hub      the same in a thread, as a context that yields the hub's address

The hub's journal is in the run's folder, and learner and actors connect again, so a restart is the same command at the
same address.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.files import disk_full
from sgpo_async.local.children import Child, Processes, wait_for
from sgpo_async.local.restarts import LIMIT, WINDOW_S, Restarts
from sgpo_async.local.run_folder import forget_journal, read_hub_file

log = logging.getLogger(__name__)

HUB_START_S = 60.0
LEAVING_S = 10.0  # time after the learner's end for the hub to tell its actors that the run is over
TICK_S = 0.25
USERS_ERROR = 2  # exit code, see `sgpo_async.cli.main`
BY_REQUEST = 128  # a higher exit code means that a signal told the hub to end the run

HubCommand = Callable[[str], Sequence[str]]
"""The hub's command line; the argument is the address at which it must listen, empty for the configured one."""


class HubProcess:
    """The hub of a run; a new process takes the place of one that crashed. `note` gets what the user should know."""

    def __init__(self, processes: Processes, command: HubCommand, *, note: Callable[[str], None]) -> None:
        self.address = ""  # empty until the first hub is ready
        self._processes, self._command, self._note = processes, command, note
        self._restarts = Restarts()
        self._start_at = 0.0
        self.child: Child | None = None  # None between a crash and the next start
        self._start()

    @property
    def finished(self) -> bool:
        """Whether the hub has ended without an error."""
        return self.child is not None and self.child.code == 0

    def tick(self) -> None:
        """Check the hub, and start it again if that is due.

        Raises RunFailed if it has ended and must not be started again, DeadlineExceeded if it does not become ready.
        """
        if self.child is None:
            if time.monotonic() >= self._start_at:
                self._start()
        elif self.child.code is None:
            self._await_ready(self.child)
        elif not self.finished or not self.address:
            self._crashed(self.child)

    def _start(self) -> None:
        name = "hub" + (f".{self._restarts.crashes}" if self._restarts.crashes else "")
        self.child = self._processes.start(name, self._command(self.address))
        self._ready = False
        self._deadline = time.monotonic() + HUB_START_S

    def _await_ready(self, child: Child) -> None:
        if self._ready:
            return
        known = read_hub_file(self._processes.folder)
        if known.get("pid") == child.process.pid:
            self.address, self._ready = known["address"], True
        elif time.monotonic() > self._deadline:
            raise DeadlineExceeded("the hub", "hub.json", HUB_START_S)

    def _crashed(self, child: Child) -> None:
        what, code = f"the hub {child.ending()}", child.code
        by_request = code is None or code > BY_REQUEST
        if not self.address or by_request or code == USERS_ERROR or disk_full(child.log):
            raise RunFailed(f"{what}: {child.complaint()}")
        pause = self._restarts.pause_after_crash(time.monotonic())
        if pause is None:
            times = f"after {LIMIT} restarts within {WINDOW_S / 60:g} minutes"
            raise RunFailed(f"{what}, not started again {times}: {child.complaint()}")
        self._note(f"{what}, starts again in {pause:g} s (see {child.log})")
        self.child, self._start_at = None, time.monotonic() + pause


@contextmanager
def kept_hub(processes: Processes, command: HubCommand) -> Iterator[str]:
    """Within this context a hub runs, and a thread starts it again if it crashes; yields its address.

    At the end the hub has LEAVING_S to end by itself; the caller stops `processes`.

    Raises RunFailed or DeadlineExceeded if the hub does not start. If it failed for good later, the end of the context
    raises that error in place of others, because it is their cause.
    """
    hub = HubProcess(processes, command, note=log.warning)
    while not hub.address:
        hub.tick()
        time.sleep(0.05)
    failures: list[Exception] = []
    closing = threading.Event()

    def keep() -> None:
        try:
            while not closing.wait(TICK_S):
                hub.tick()
        except Exception as error:  # the thread ends; the end of the context raises it
            log.error("%s", error)
            failures.append(error)

    thread = threading.Thread(target=keep, name="kept-hub", daemon=True)
    thread.start()
    try:
        yield hub.address
    finally:
        closing.set()
        thread.join()
        if failures:
            raise failures[0]
    if hub.child is not None:
        wait_for(hub.child, LEAVING_S)
        if hub.child.code is not None:
            forget_journal(processes.folder)

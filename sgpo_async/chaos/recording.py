"""A hub whose journal keeps every event, and the replay of a whole run from it.

    python -m sgpo_async.chaos.recording CONFIG [key=value ...]      serves like `sgpo-async hub`

    hub.journal ── save ──▶ entries move to the table `history`, in the transaction that deletes them
    hub.journal.rollouts.N ──▶ a second name in DIR/history, before the journal can delete the first
    end of the run ──▶ DIR/history/hub.journal

The state at the very beginning is kept, too. The core is deterministic, so the events lead from it to every later state
of the run, through all restarts of the hub.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from sgpo_async import logs
from sgpo_async.chaos.audit import Observed, observe
from sgpo_async.config import Run, load
from sgpo_async.errors import SgpoError
from sgpo_async.hub import HubCore, serve
from sgpo_async.hub.journal import FILE, Journal
from sgpo_async.hub.recovery import load_state, read_event
from sgpo_async.hub.rollout_files import PREFIX, Place, RolloutFiles
from sgpo_async.local.hub_process import USERS_ERROR
from sgpo_async.processes.stacks import print_stacks_on_signal
from sgpo_async.tasks.benchmarks import open_benchmarks
from sgpo_async.tasks.sources import source_of

HISTORY = "history"  # folder in the run's folder
SLOW = "slow-disk"  # file in the run's folder: the seconds that a commit of the journal takes
FIRST = "first state"

_SCHEMA = "CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY, at REAL NOT NULL, event BLOB NOT NULL)"
_MOVE = "INSERT INTO history (at, event) SELECT at, event FROM entries ORDER BY number"


class RecordedJournal(Journal):
    """A journal that keeps what it has saved; and, as long as the file SLOW exists, on a slow disk."""

    def __init__(self, folder: Path) -> None:
        self._history, self._slow = folder / HISTORY, folder / SLOW
        self._history.mkdir(exist_ok=True)
        super().__init__(folder)
        with self.reported():
            self._db.execute(_SCHEMA)
            self.rollouts.skip(self._history)

    def commit(self) -> None:
        with suppress(OSError, ValueError):
            time.sleep(float(self._slow.read_text(encoding="ascii")))
        super().commit()

    def save(self, dump: Callable[[], tuple[bytes, Collection[Place]]]) -> None:
        def kept() -> tuple[bytes, Collection[Place]]:
            state, places = dump()
            if self.get(FIRST) is None:
                self.set(FIRST, state)
            return state, places

        with self.reported():
            self._keep_rollouts()
            self._db.execute(_MOVE)
            super().save(kept)

    def clear(self) -> None:
        super().clear()
        with self.reported():
            self._db.execute("DELETE FROM history")

    def remove(self) -> None:
        with self.reported():
            self._keep_rollouts()
        self.close()
        (self._history / FILE).unlink(missing_ok=True)
        os.link(self.path, self._history / FILE)
        super().remove()

    def _keep_rollouts(self) -> None:
        for file in self.path.parent.glob(f"{PREFIX}*"):
            kept = self._history / file.name
            try:
                os.link(file, kept)
            except FileExistsError:
                if not file.samefile(kept):
                    raise


def replayed(run: Run, folder: Path) -> Iterator[Observed]:
    """Every event of the run whose history is in `folder`, with its effects and the state after it.

    Raises HubError if the history is incomplete or cannot be read.
    """
    journal = Journal(folder)
    journal.rollouts = RolloutFiles(folder)
    try:
        core = HubCore(run, source_of(run), benchmarks=open_benchmarks(run.evaluation))
        core = load_state(core, journal, FIRST)
        for number, (at, body) in enumerate(chain(journal.entries("history"), journal.entries())):
            with journal.reported():
                event = read_event(body, journal.rollouts)
            effects = core.handle(event, at)
            yield observe(core, event, effects, number=number, at=at)
    finally:
        journal.close()


def main() -> int:
    """Serve the run of the configuration in the arguments."""
    logs.set_up("hub")
    print_stacks_on_signal()
    try:
        return serve(load(sys.argv[1], sys.argv[2:]), open_journal=RecordedJournal)
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return USERS_ERROR


if __name__ == "__main__":
    sys.exit(main())

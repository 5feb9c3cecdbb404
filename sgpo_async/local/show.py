"""Shows a supervised run: collects views, displays them, and prints a closing table."""

from __future__ import annotations

import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from sgpo_async.config import Run, to_plain
from sgpo_async.config.schema import CHECKPOINTS
from sgpo_async.local.display import View
from sgpo_async.local.live import display_on
from sgpo_async.local.run_folder import dashboard_url, newest_checkpoint
from sgpo_async.local.supervisor import Supervisor
from sgpo_async.local.watch import Watch
from sgpo_async.logs import printable
from sgpo_async.processes.torchrun import repeated_command
from sgpo_async.report import final_rows, write_report
from sgpo_async.report.advisories import advice_after

POLICY = "policy"  # the learner's export, a Hugging Face folder


class Show:
    """Shows one run on standard output: live at a terminal, in lines elsewhere."""

    def __init__(self, settings: Run, *, again: str = "") -> None:
        """`again`: what the user enters to go on after an interruption; default: the command of this process."""
        self._settings, self._again = settings, again
        self._console = Console(markup=False, emoji=False)
        self._folder = Path(settings.folder)
        hub = settings.hub
        max_bytes = hub.max_message_mb << 20
        self._since = time.time()
        self._watch = Watch(self._folder, keys=hub.keys, max_bytes=max_bytes, since=self._since)
        self._display = display_on(self._console)
        self._started = time.monotonic()

    @property
    def stalled(self) -> str:
        """The hub's reason why the run makes no progress; empty if it does."""
        return str(self._watch.status.get("stalled", ""))

    def update(self, supervisor: Supervisor) -> None:
        """Read the newest state and show it."""
        self._watch.poll(supervisor.address)
        self._display.show(
            View(
                name=self._settings.name,
                phase=_phase(supervisor.phase, self._watch),
                steps=self._settings.steps,
                elapsed_s=time.monotonic() - self._started,
                metrics=self._watch.metrics,
                history=self._watch.history,
                status=self._watch.status,
                actors={slot.name: slot.state for slot in supervisor.slots},
                notes=[printable(note) for note in supervisor.notes],
                sample=self._watch.sample,
                dashboard=dashboard_url(self._folder),
            )
        )

    def close(self, *, stopping: bool) -> None:
        """Release the terminal before the processes are ended and errors are printed."""
        self._display.close()
        self._watch.close()
        if stopping:
            self._console.print("stopping ... (press Ctrl-C again to stop at once)")

    def stopped(self, *, failed: bool = False) -> None:
        """Print how a run that was stopped or has failed goes on."""
        since = 0.0 if self._settings.learner.resume is True else self._since
        step = newest_checkpoint(self._folder / CHECKPOINTS, since=since)
        if step is None and not failed:
            self._console.print("there is no checkpoint to resume from: the run was stopped before its first one")
        if step is not None:
            command = self._again or repeated_command("learner.resume=true")
            self._console.print(f"to go on from the checkpoint of step {step}: {command}", soft_wrap=True)

    def closing(self) -> None:
        """Print the closing table and where the report is, if the run came far enough to have metrics."""
        self._watch.poll("")
        if not self._watch.history:
            return
        table = Table(box=box.SIMPLE, show_header=False, title=self._settings.name, title_justify="left")
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for row in final_rows(self._folder):
            table.add_row(*row)
        for what, remedy in advice_after(self._watch.history, to_plain(self._settings)):
            table.add_row("advice", f"{what}: {remedy}")
        self._console.print()
        self._console.print(table)
        if (policy := self._folder / POLICY).exists():
            self._console.print(f"policy: {policy}", soft_wrap=True)
        self._console.print(f"report: {write_report(self._folder)}", soft_wrap=True)


def _phase(phase: str, watch: Watch) -> str:
    """The phase; while all processes run, how far the run has come."""
    if not phase.startswith("starting the learner"):
        return phase
    if watch.metrics:
        return "training"
    serving = any(row.get("state") == "serving" for row in watch.status.get("actors") or [])
    return "first rollouts" if serving else phase

"""Shows a run that another process, perhaps on another machine, has started: from what its hub says alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sgpo_async.errors import HubError
from sgpo_async.local.display import View
from sgpo_async.local.hub_rows import hub_rows
from sgpo_async.local.live import LivePicture, display_on
from sgpo_async.local.watch import Watch
from sgpo_async.logs import printable
from sgpo_async.processes.signals import Signals

MAX_BYTES = 2**30  # the hub's own limit is not known
FIRST_S = 30.0  # for the hub's first answer
GONE_S = 60.0  # without an answer, after which the hub counts as gone; before, it may start again
LATE_S = 5.0  # without an answer, after which the display says so
TICK_S = 0.25


def watch_hub(address: str, *, keys: str) -> int:
    """Show the run of this hub until it ends; return 0, or 128 + the signal that ended the display.

    Raises HubError if the hub does not answer (any more), or refuses the connection.
    """
    console = Console(markup=False, emoji=False)
    display = display_on(console)
    watch = Watch(None, keys=keys, max_bytes=MAX_BYTES)
    began = time.monotonic()
    view = None
    try:
        with Signals() as signals:
            while not signals.stop:
                watch.poll(address)
                view = view_of(watch, address, now=time.monotonic())
                display.show(view)
                if watch.status.get("closing"):
                    break
                check_answers(watch, address, began=began, now=time.monotonic())
                signals.wait(TICK_S)
    finally:
        display.close()
        watch.close()
    if view is not None and watch.status:
        _close(console, view, live=isinstance(display, LivePicture))
    return signals.exit_code if signals.stop else 0


def view_of(watch: Watch, address: str, *, now: float) -> View:
    """The state of the run as far as the hub tells it."""
    status, settings = watch.status, watch.settings
    return View(
        name=printable(str(settings.get("name") or address)),
        phase=phase_of(status) if watch.answered else f"waiting for the hub at {address}",
        steps=status.get("steps") or 0,
        elapsed_s=status.get("uptime_s") or 0.0,
        metrics={},
        history=watch.history,
        status=status,
        actors={},
        notes=_notes(watch, now),
        details=True,
    )


def phase_of(status: Mapping[str, Any]) -> str:
    """What the run does."""
    learner = status.get("learner") or {}
    if status.get("closing"):
        return f"ended: {printable(str(status['closing']))}"
    if not learner.get("ranks"):
        return "waiting for the learner"
    if not any(actor.get("state") == "serving" for actor in status.get("actors") or []):
        return "waiting for actors"
    return "training" if status.get("step") or learner.get("training") is not None else "first rollouts"


def unknown(settings: Mapping[str, Any]) -> str:
    """What the hub does not know, and where it is."""
    named = settings.get("out") and settings.get("name")
    folder = f"{settings['out']}/{settings['name']}" if named else "the run's folder"
    return printable(f"the hub does not know loss, alpha, trainer idle and mismatch: see {folder} at the learner")


def check_answers(watch: Watch, address: str, *, began: float, now: float) -> None:
    """Raise HubError if the hub has not answered for too long."""
    if not watch.answered and now - began > FIRST_S:
        raise HubError(f"hub {address}: no answer within {FIRST_S:g} s; check that the hub runs, and the address")
    if watch.answered and now - watch.answered > GONE_S:
        step, steps = watch.status.get("step"), watch.status.get("steps")
        raise HubError(
            f"hub {address}: no answer for {GONE_S:g} s, the last one at step {step} of {steps}; "
            "the hub was killed, or the network fails"
        )


def _notes(watch: Watch, now: float) -> list[str]:
    if not watch.answered:
        return []
    late = now - watch.answered
    absent = [f"no answer from the hub for {late:.0f} s; it may start again"] if late > LATE_S else []
    return [unknown(watch.settings), *absent]


def _close(console: Console, view: View, *, live: bool) -> None:
    """Print what lines do not show; the live picture has it already."""
    for name, value in [] if live else hub_rows(view.status):
        console.print(f"{name}: {value}", soft_wrap=True, highlight=False)
    console.print(f"{view.name} {view.phase}", soft_wrap=True, highlight=False)

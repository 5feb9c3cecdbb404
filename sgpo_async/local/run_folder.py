"""Files in a run's folder: hub.json (with the hub's address), the hub's journal, checkpoints, summary.json."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil

from sgpo_async.errors import HubError
from sgpo_async.files import step_folders, step_of, written_since
from sgpo_async.hub.dashboard import CONTACT as DASHBOARD
from sgpo_async.hub.journal import FILE as JOURNAL
from sgpo_async.hub.journal import in_use
from sgpo_async.metrics.reader import SUMMARY, read_summary
from sgpo_async.weights.store_file import machine

HUB_FILE = "hub.json"


def read_hub_file(folder: Path) -> dict[str, Any]:
    """{address, pid, machine, ...} of the hub that writes to `folder`; empty if there is none (yet)."""
    return _read_contact(folder / HUB_FILE)


def dashboard_url(folder: Path) -> str:
    """Where the hub's dashboard can be seen; "" if there is none (yet)."""
    return str(_read_contact(folder / DASHBOARD).get("url", ""))


def _read_contact(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the hub is writing it at this moment
        return {}
    return content


def claim(folder: Path, *, continues: bool = False) -> None:
    """Remove the hub.json of a dead hub. Raises HubError if another run writes to `folder`.

    The dead hub's journal is removed too, unless the run `continues`: then its actors find the same run again.
    """
    hub = read_hub_file(folder)
    if hub and hub.get("machine", machine()) != machine():  # its process id says nothing here, its lock does
        if in_use(folder):
            where = f"at {hub['address']}, on another machine or in another container"
            raise HubError(f"{folder}: another run writes here (its hub is {where}); choose another name=NAME")
    elif hub and _lives(hub["pid"], (folder / HUB_FILE).stat().st_mtime):
        raise HubError(f"{folder}: another run writes here (its hub is process {hub['pid']}); choose another name=NAME")
    forget_hub(folder)
    if not continues:
        forget_journal(folder)


def forget_hub(folder: Path) -> None:
    """Remove hub.json, and dashboard.json, of a hub that is dead and could not remove them."""
    for name in (HUB_FILE, DASHBOARD):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / name).unlink()


def forget_journal(folder: Path) -> None:
    """Remove the journal of a hub that is dead and whose run is over."""
    for file in folder.glob(f"{JOURNAL}*"):
        file.unlink(missing_ok=True)


def _lives(pid: int, wrote: float) -> bool:
    """Whether the process that wrote the file at time `wrote` still runs; another one may have its pid now."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= wrote and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def newest_checkpoint(folder: Path, *, since: float = 0.0) -> int | None:
    """The highest step of the checkpoints in `folder`; None if it has none that was written after `since`.

    `since` is in seconds since the epoch.
    """
    return max((step_of(path) for path in step_folders(folder) if written_since(path, since)), default=None)


def summary_written(folder: Path, since: float) -> bool:
    """Whether the learner has trained all steps of the run that began at `since` (seconds since the epoch)."""
    return written_since(folder / SUMMARY, since) and not read_summary(folder).get("interrupted")

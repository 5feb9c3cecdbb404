"""The hub as a process: assembles its parts, writes its address to a file, and removes its files at the end.

serve ─▶ HubCore, from the journal if there is one ─▶ Router, StoreFile, Signals, hub.json ─▶ Loop ─▶ exit code
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sgpo_async.config import Run
from sgpo_async.config.rules import endpoint_of
from sgpo_async.files import reporting_write_errors, write_whole
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.dashboard import DashboardProcess
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.learner_weights import LearnerWeights
from sgpo_async.hub.loop import Loop, collect_rarely
from sgpo_async.hub.recovery import recover
from sgpo_async.hub.uploads import Uploads
from sgpo_async.logs import fields
from sgpo_async.model.folder import version_bytes
from sgpo_async.processes.signals import Signals
from sgpo_async.session import WeightSender
from sgpo_async.tasks.benchmarks import open_benchmarks
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Router, RouterMailbox
from sgpo_async.transport.keys import public_key
from sgpo_async.transport.token import TOKEN_FILE, make_token
from sgpo_async.weights.store_file import StoreFile, machine

log = logging.getLogger(__name__)


def serve(run: Run, *, open_journal: Callable[[Path], Journal] = Journal) -> int:
    """Run the hub until the learner finishes or a signal arrives; return the exit code.

    `open_journal` opens the journal in the run's folder, if the run has one.

    The exit code is 0 after the learner has finished, and 128 plus the signal number after a signal. While the hub can
    be reached, `<run.folder>/hub.json` contains its address, and hub.token what the learner of a hub without keys must
    know; at the end the hub removes both, the weight store and the journal. If a killed hub has left its journal, this
    hub continues from it.

    Raises HubError if the address is in use or the keys or the journal are not usable, DataError if problems cannot be
    read, and SgpoError if the folder is not writable.
    """
    core = HubCore(run, source_of(run), benchmarks=open_benchmarks(run.evaluation), run_id=uuid.uuid4().hex)
    folder = Path(run.folder)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        journal = open_journal(folder) if run.hub.journal else None
        elapsed = 0.0
        if journal:
            stack.callback(journal.close)
            core, elapsed = recover(core, journal)
        address = _address(run, journal)
        token = "" if run.hub.keys else make_token(folder)  # before the hub can be reached: the learner reads it then
        most = run.hub.max_messages_per_s
        router = Router(address, keys=run.hub.keys, max_bytes=run.hub.max_message_mb * 2**20, max_per_s=most)
        stack.callback((folder / TOKEN_FILE).unlink, missing_ok=True)
        stack.callback(router.close)
        store = _store(run, core, journal, stack)
        signals = stack.enter_context(Signals())
        stack.enter_context(contact_file(folder / "hub.json", _contact(run, router.address, store.path)))
        uploads = Uploads(store.path, folder_url) if (folder_url := core.weight_routes.folder) else None
        weights = LearnerWeights(store, deltas=run.hub.weight_deltas, uploads=uploads)
        stack.callback(weights.close)
        endpoint = endpoint_of(router.address)
        assert endpoint, router.address
        host, cuda = endpoint[0], run.engine.broadcasts_on_gpus
        dashboard = None
        if run.hub.dashboard:
            dashboard = DashboardProcess(folder, router.address, listen=run.hub.dashboard, keys=run.hub.keys)
            stack.callback(dashboard.close)
        began = time.monotonic() - elapsed
        loop = Loop(
            core,
            mailbox=RouterMailbox(router),
            authority=_authority(run, token),
            spawn_sender=lambda name, road: WeightSender(store.path, name, host, road=road, cuda=cuda),
            weights=weights,
            journal=journal,
            dashboard=dashboard,
            clock=lambda: time.monotonic() - began,
        )
        about = fields(event="listening", address=router.address, run=run.name, steps=run.steps)
        log.info("listening at %s for run %s of %d steps", router.address, run.name, run.steps, extra=about)
        if journal:
            journal.set("address", router.address.encode())
            journal.set("machine", machine().encode())
        if elapsed:
            log.warning("the hub has restarted at step %d, with %d groups in its buffer", *_position(core))
            loop.restart()
        collect_rarely()
        loop.run(interrupted=lambda: _stop_reason(signals), hurried=lambda: signals.kill)
        if journal:
            journal.remove()
    return signals.exit_code if signals.stop else 0


def _store(run: Run, core: HubCore, journal: Journal | None, stack: contextlib.ExitStack) -> StoreFile:
    """The weight store, from the memory of the hub before the restart if that was on this machine."""
    here = journal is not None and journal.get("machine") == machine().encode()  # else /proc/PID is another process
    earlier = core.learner_store if here else ""
    store = StoreFile(Path(run.folder), expected_bytes=version_bytes(run), earlier=earlier)
    stack.callback(store.close)
    core.store, core.machine = store.path, machine()
    return store


def _contact(run: Run, address: str, store: str) -> dict[str, Any]:
    """The content of hub.json."""
    key = public_key(run.hub.keys, "server").decode() if run.hub.keys else ""
    return {"address": address, "pid": os.getpid(), "machine": machine(), "store": store, "public_key": key}


def _address(run: Run, journal: Journal | None) -> str:
    """The configured address; if its port is 0, the address before the restart, if there was one."""
    known = journal.get("address") if journal else None
    return known.decode() if known and run.hub.address.endswith(":0") else run.hub.address


def _authority(run: Run, token: str) -> Authority:
    if run.hub.keys:
        return Authority(key=public_key(run.hub.keys, "learner"))
    return Authority(token=token, token_file=str((Path(run.folder) / TOKEN_FILE).absolute()))


def _position(core: HubCore) -> tuple[int, int]:
    return core.training.step, len(core.training.leases.complete)


def _stop_reason(signals: Signals) -> str:
    """Why the hub has to stop; empty if no signal has arrived."""
    return f"the hub {signals.reason}" if signals.stop else ""


@contextlib.contextmanager
def contact_file(path: Path, contact: dict[str, Any]) -> Iterator[None]:
    """Within this context, the file `path` contains `contact` as JSON; it is written atomically, removed at the end."""
    write_whole(path, json.dumps(contact))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)

"""The hub as a process: assembles its parts, writes its address to a file, and removes its files at the end.

serve ─▶ Router, StoreFile, Signals, hub.json ─▶ Loop(HubCore) ─▶ exit code
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sgpo_async.config import Run
from sgpo_async.files import reporting_write_errors, write_whole
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.loop import Loop
from sgpo_async.model.folder import model_folder
from sgpo_async.processes.signals import Signals
from sgpo_async.session import WeightSender
from sgpo_async.tasks.benchmarks import open_benchmarks
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Router, RouterMailbox
from sgpo_async.transport.keys import public_key
from sgpo_async.weights.store_file import StoreFile


def serve(run: Run) -> int:
    """Run the hub until the learner finishes or a signal arrives; return the exit code.

    The exit code is 0 after the learner has finished, and 128 plus the signal number after a signal. While the hub can
    be reached, `<run.folder>/hub.json` contains its address; at the end the hub removes it and the weight store.

    Raises HubError if the address is in use or the keys are not usable, DataError if problems cannot be read, and
    SgpoError if the folder is not writable.
    """
    source = source_of(run)
    benchmarks = open_benchmarks(run.evaluation)
    folder = Path(run.folder)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    router = Router(run.hub.address, keys=run.hub.keys, max_bytes=run.hub.max_message_mb * 2**20)
    host = router.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    with contextlib.ExitStack() as stack:
        stack.callback(router.close)
        store = StoreFile(folder, expected_bytes=weight_bytes(run.model.path))
        stack.callback(store.close)
        signals = stack.enter_context(Signals())
        key = public_key(run.hub.keys, "server").decode() if run.hub.keys else ""
        contact = {"address": router.address, "pid": os.getpid(), "store": store.path, "public_key": key}
        stack.enter_context(contact_file(folder / "hub.json", contact))
        core = HubCore(run, source, benchmarks=benchmarks, store=store.path)
        spawn_sender = partial(WeightSender, store.path, host=host, cuda=run.engine.broadcasts_on_gpus)
        loop = Loop(core, mailbox=RouterMailbox(router), spawn_sender=spawn_sender)
        loop.run(interrupted=lambda: _stop_reason(signals))
    return signals.exit_code if signals.stop else 0


def _stop_reason(signals: Signals) -> str:
    """Why the hub has to stop; empty if no signal has arrived."""
    return f"the hub received {signal.Signals(signals.received[0]).name}" if signals.stop else ""


def weight_bytes(path: str) -> int:
    """Total size of a model's weight files in bytes; 0 if they are not in a local folder."""
    return sum(file.stat().st_size for file in Path(model_folder(path)).glob("*.safetensors"))


@contextlib.contextmanager
def contact_file(path: Path, contact: dict[str, Any]) -> Iterator[None]:
    """Within this context, the file `path` contains `contact` as JSON; it is written atomically, removed at the end."""
    write_whole(path, json.dumps(contact))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)

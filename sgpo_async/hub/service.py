"""The hub as a process: puts its parts together, says where it is, and tidies up behind itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sgpo_async.config import Run
from sgpo_async.files import reporting_write_errors, write_whole
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.loop import Loop
from sgpo_async.model.folder import model_folder
from sgpo_async.session import WeightSender
from sgpo_async.tasks.benchmarks import open_benchmarks
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Router, RouterMailbox
from sgpo_async.transport.keys import public_key
from sgpo_async.weights.store_file import StoreFile


def serve(run: Run) -> int:
    """Be the hub of `run` until its learner finishes (0) or a signal comes (128 + its number).

    Writes `<run.folder>/hub.json` while it can be reached, and leaves nothing behind.

    Raises HubError if the address is taken or the keys are not usable, DataError for problems that cannot be read,
    SgpoError if the folder cannot be written.
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
        place = {"address": router.address, "pid": os.getpid(), "store": store.path, "public_key": key}
        stack.enter_context(announced(folder / "hub.json", place))
        core = HubCore(run, source, benchmarks=benchmarks, store=store.path)
        spawn_sender = partial(WeightSender, store.path, host=host, cuda=run.engine.broadcasts_on_gpus)
        loop = Loop(core, mailbox=RouterMailbox(router), spawn_sender=spawn_sender)
        loop.run(interrupted=signals.reason)
    return signals.exit_code


def weight_bytes(path: str) -> int:
    """Size of a model's weight files; 0 if they are not in a local folder."""
    return sum(file.stat().st_size for file in Path(model_folder(path)).glob("*.safetensors"))


@contextlib.contextmanager
def announced(path: Path, place: dict[str, Any]) -> Iterator[None]:
    """Within this context `path` tells where the hub is; nobody ever sees half of it."""
    write_whole(path, json.dumps(place))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class Signals:
    """Within this context SIGTERM and SIGINT are noted instead of raised."""

    def __init__(self) -> None:
        self.received: int = 0

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        self.received = self.received or number

    def reason(self) -> str:
        """Why to end; empty while there is no reason."""
        return f"the hub got {signal.Signals(self.received).name}" if self.received else ""

    @property
    def exit_code(self) -> int:
        """0, or by convention 128 and the number of the signal that ended us."""
        return 128 + self.received if self.received else 0

"""How long a version takes from one process to another on this machine, by every road, against a copy and bare RPC.

copy        memory to memory, in this process
bare rpc    Torch RPC alone: the same bytes of memory again and again, not written anywhere (`bench.worker_rpc`)
rpc, sockets, folder    a real weight sender (uploader) and a real weight receiver, whole versions
delta       the road rpc, with the difference to the version before, of which one word in a hundred has changed
shared      an actor that reads the store of another one

The settings take turns. A figure is the median of its turns: seconds from the moment the version is visible in the
store of the source until the weight receiver reports it as whole and verified.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from sgpo_async.actor.shared_store import SharedStore
from sgpo_async.bench.random_words import RandomWords
from sgpo_async.errors import DeadlineExceeded
from sgpo_async.session import SenderUp, VersionReceived, WeightReceiver, WeightSender
from sgpo_async.session.settings import Deltas
from sgpo_async.session.uploader_process import WeightUploader
from sgpo_async.weights import StoreFile, StoreWriter
from sgpo_async.weights.store_layout import SLOTS

Kind = Literal["rpc", "sockets", "folder", "delta", "shared"]
KINDS: tuple[Kind, ...] = ("rpc", "sockets", "folder", "delta", "shared")
WAIT_S = 600.0
POLL_S = 0.001


class Source:
    """A store, and a model of random words of which few change from version to version."""

    def __init__(self, mbytes: int) -> None:
        self.file = StoreFile(tempfile.gettempdir())
        self._writer = StoreWriter(self.file.path)
        self._model = RandomWords(mbytes)
        self.version = -1

    def publish(self) -> float:
        """Publish the next version; return when it was visible."""
        self.version += 1
        self._writer.publish(self.version, self._model.next())
        return time.monotonic()

    def close(self) -> None:
        """Free the store."""
        self._writer.close()
        self.file.close()


def arrival(kind: Kind, mbytes: int) -> dict[str, float]:
    """Seconds and received bytes of one version, after one for each slot of the stores has arrived."""
    source = Source(mbytes)
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        wait = stack.enter_context(_receiving(kind, source))
        for _ in range(SLOTS):
            source.publish()
            wait()
        began = source.publish()
        event = wait()
        return {"seconds": time.monotonic() - began, "bytes": event.received}


@contextlib.contextmanager
def _receiving(kind: Kind, source: Source) -> Iterator[Callable[[], VersionReceived]]:
    """A receiver of the versions of `source`; yields a function that waits for the newest one."""
    if kind == "shared":
        shared = SharedStore(source.file.path)
        yield lambda: _wait(shared, source.version)
        shared.stop()
        return
    local = StoreFile(tempfile.gettempdir())
    road: Literal["rpc", "sockets", "folder"] = "rpc" if kind == "delta" else kind
    deltas: Deltas = "always" if kind == "delta" else "never"
    receiver = WeightReceiver("bench", store=local.path, road=road, deltas=deltas)
    sender: WeightSender | WeightUploader
    with tempfile.TemporaryDirectory(prefix="sgpo-bench-") as folder:
        if road == "folder":
            sender = WeightUploader(source.file.path, f"file://{folder}")
            receiver.open_folder(f"file://{folder}")
        else:
            sender = WeightSender(source.file.path, "bench", "127.0.0.1", road=road)
            up = _up(sender)
            receiver.connect("127.0.0.1", up.port, up.secret)
        try:
            yield lambda: _wait(receiver, source.version)
        finally:
            sender.stop()
            receiver.stop()
            local.close()


def _up(sender: WeightSender) -> SenderUp:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for event in sender.poll():
            assert isinstance(event, SenderUp), event
            return event
        time.sleep(POLL_S)
    raise DeadlineExceeded("the weight sender", "start", WAIT_S)


def _wait(receiver: WeightReceiver | SharedStore, version: int) -> VersionReceived:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for event in receiver.poll():
            assert isinstance(event, VersionReceived), event
            if event.version == version:
                return event
        time.sleep(POLL_S)
    raise DeadlineExceeded("the weight receiver", f"version {version}", WAIT_S)


class BareRpc:
    """Two processes of `bench.worker_rpc`."""

    def __init__(self, mbytes: int) -> None:
        command = [sys.executable, "-m", "sgpo_async.bench.worker_rpc"]
        self._folder = tempfile.TemporaryDirectory(prefix="sgpo-bench-")  # where the two find each other
        rest = [f"{self._folder.name}/init", str(mbytes)]
        quiet = os.environ | {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._serving = subprocess.Popen([*command, "0", *rest], env=quiet)
        self._fetching = subprocess.Popen(
            [*command, "1", *rest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
        )
        self.seconds()  # the first turn opens connections

    def seconds(self) -> float:
        """One turn."""
        assert self._fetching.stdin and self._fetching.stdout
        self._fetching.stdin.write("\n")
        self._fetching.stdin.flush()
        return float(self._fetching.stdout.readline())

    def close(self) -> None:
        """End both."""
        for process in (self._serving, self._fetching):
            process.kill()
            process.wait(WAIT_S)
        self._folder.cleanup()


def copy_s(mbytes: int) -> float:
    """Seconds of one copy within memory, to where there was a copy before."""
    source, target = np.ones(mbytes * 2**20, np.uint8), np.ones(mbytes * 2**20, np.uint8)
    began = time.monotonic()
    np.copyto(target, source)
    return time.monotonic() - began


def measure(mbytes: int, turns: int) -> dict[str, Any]:
    """The medians of all settings, which take turns."""
    seconds: dict[str, list[float]] = {}
    received: dict[str, float] = {}
    bare = BareRpc(mbytes)
    try:
        for _ in range(turns):
            seconds.setdefault("copy", []).append(copy_s(mbytes))
            seconds.setdefault("bare rpc", []).append(bare.seconds())
            for kind in KINDS:
                found = arrival(kind, mbytes)
                seconds.setdefault(kind, []).append(found["seconds"])
                received[kind] = found["bytes"]
    finally:
        bare.close()
    return {
        name: {
            "seconds": statistics.median(values),
            "least_s": min(values),
            "most_s": max(values),
            "gb_per_s": mbytes * 2**20 / statistics.median(values) / 1e9,
            "bytes": received.get(name, mbytes * 2**20),
        }
        for name, values in seconds.items()
    }


def table(mbytes: int, rows: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    lines = [f"{'road':>9} {'seconds':>8} {'least':>7} {'most':>7} {'GB/s':>7} {'bytes':>7} {'of bare rpc':>11}"]
    bare = rows["bare rpc"]["seconds"]
    for name, row in rows.items():
        share = f"{row['bytes'] / (mbytes * 2**20):.1%}"
        lines.append(
            f"{name:>9} {row['seconds']:>8.3f} {row['least_s']:>7.3f} {row['most_s']:>7.3f} {row['gb_per_s']:>7.2f} "
            f"{share:>7} {bare / row['seconds']:>11.2f}"
        )
    return lines

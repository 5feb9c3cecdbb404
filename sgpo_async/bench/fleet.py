"""How long a version takes to all nodes of a fleet, and what it costs the hub: real hub, real sessions, real sockets.

Each node is a network namespace that sends at a limited rate (`bench.namespaces`). The learner and the actors are
`bench.worker_node`: they have no model and no engine, but publish, pull and pass on weights as the real ones do.

In one more version, nodes that the hub serves are killed while it is on its way.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgpo_async.bench.namespaces import Namespace, network
from sgpo_async.errors import DeadlineExceeded
from sgpo_async.session.settings import Deltas
from sgpo_async.transport.keys import create_keys

PORT = 5757
WAIT_S = 600.0  # for all nodes to have joined, or to have a version
SETTLE_S = 2.0  # after the last node has joined
KILL_AFTER = 0.3  # of the time that one copy takes at the given rate

Event = dict[str, Any]


class Node:
    """A process on a node; its events arrive in the fleet's queue as (name, event)."""

    def __init__(self, name: str, prefix: Sequence[str], events: queue.Queue[tuple[str, Event]], *command: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._events = events
        threading.Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait(WAIT_S)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                self._events.put((self.name, json.loads(line)))


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    nodes: int
    fanout: int  # hub.weight_fanout
    mbytes: int  # size of a version (2^20 bytes)
    mbit_per_s: float  # rate at which each node can send (10^6 bits a second)
    deltas: Deltas = "never"

    @property
    def copy_s(self) -> float:
        """How long one node takes to send one version."""
        return self.mbytes * 2**20 * 8 / (self.mbit_per_s * 1e6)

    @property
    def served(self) -> int:
        """How many copies the hub sends at the same time."""
        return min(self.fanout or self.nodes, self.nodes)


class Fleet:
    """A hub, a learner and nodes that have joined it."""

    def __init__(self, places: Sequence[Namespace], folder: Path, setting: Setting) -> None:
        self._events: queue.Queue[tuple[str, Event]] = queue.Queue()
        self.hub_place, *self._places = places
        self.sources: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}
        self._folder, self._setting = folder, setting
        self._keys = str(folder / "keys")
        self._address = f"tcp://{self.hub_place.address}:{PORT}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start all processes and wait until all nodes have joined; end them."""
        create_keys(self._keys)
        overrides = [
            f"hub.address={self._address}",
            f"hub.keys={self._keys}",
            f"hub.weight_fanout={self._setting.fanout}",
        ]
        settings = [*overrides, f"out={self._folder}", "name=fleet", "learner.batch_timeout_s=3600"]
        with contextlib.ExitStack() as stack:
            hub = Node("hub", self.hub_place.prefix, self._events, "sgpo_async.cli", "hub", "", *settings)
            stack.callback(hub.stop)
            self._wait_for_file(self._folder / "fleet" / "hub.json")
            worker = "sgpo_async.bench.worker_node"
            join = (self._address, self._keys)
            size = str(self._setting.mbytes)
            self._learner = Node("learner", self.hub_place.prefix, self._events, worker, "publish", *join, size)
            stack.callback(self._learner.stop)
            self._next("ready", {"learner"})
            for number, place in enumerate(self._places):
                name, deltas = f"n{number}", self._setting.deltas
                node = Node(name, place.isolated, self._events, worker, "receive", *join, name, deltas)
                self.nodes[name] = node
                stack.callback(node.stop)
            for name, event in self._next("joined", set(self.nodes)).items():
                self.sources[name] = event["source"]
            time.sleep(SETTLE_S)
            yield

    def publish(self, *, kill: Sequence[str] = (), after_s: float = 0.0) -> dict[str, Any]:
        """Publish a version and wait until all nodes have it; kill some meanwhile."""
        sent = self.hub_place.sent()
        assert self._learner.process.stdin
        self._learner.process.stdin.write("\n")
        self._learner.process.stdin.flush()
        published = self._next("published", {"learner"})["learner"]
        if kill:
            time.sleep(max(0.0, published["at"] + after_s - time.time()))
        for name in kill:
            self.nodes.pop(name).stop()
        arrived = self._next("received", set(self.nodes), version=published["version"])
        assert len({event["digest"] for event in arrived.values()}) == 1
        size = self._setting.mbytes * 2**20
        return {
            "version": published["version"],
            "seconds": max(event["at"] for event in arrived.values()) - published["visible"],
            "hub_copies": (self.hub_place.sent() - sent) / size,
            "received_copies": sum(event["bytes"] for event in arrived.values()) / size / len(arrived),
        }

    def _next(self, kind: str, names: set[str], *, version: int | None = None) -> dict[str, Event]:
        """Wait for an event of this kind (and version) from each of these; the last one of each."""
        found: dict[str, Event] = {}
        deadline = time.monotonic() + WAIT_S
        while missing := names - found.keys():
            try:
                name, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DeadlineExceeded(", ".join(sorted(missing)), kind, WAIT_S) from None
            if event["event"] == "joined":
                self.sources[name] = event["source"]
            if event["event"] == kind and (version is None or event["version"] >= version):
                found[name] = event
        return found

    def _wait_for_file(self, path: Path) -> None:
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the hub", "start", WAIT_S)
            time.sleep(0.05)


def measure(setting: Setting, *, versions: int = 3, kill: int = 0) -> dict[str, Any]:
    """Publish `versions` versions, and one more during which `kill` nodes that the hub serves are killed.

    Returns seconds until all nodes had a version (median), the copies that the hub sent, and the bounds.
    """
    with (
        network(setting.nodes + 1, mbit_per_s=setting.mbit_per_s) as places,
        tempfile.TemporaryDirectory(prefix="sgpo-fleet-") as folder,
    ):
        fleet = Fleet(places, Path(folder), setting)
        with fleet.running():
            rows = [fleet.publish() for _ in range(versions)]
            hops = max(_hops(fleet.sources, name) for name in fleet.sources)
            first = [name for name, source in fleet.sources.items() if not source][:kill]
            killed = fleet.publish(kill=first, after_s=KILL_AFTER * setting.copy_s) if first else None
    medians = {key: statistics.median(row[key] for row in rows) for key in ("seconds", "hub_copies", "received_copies")}
    bounds = {
        "hops": hops,
        "copy_s": setting.copy_s,
        "links_s": setting.served * setting.copy_s,
        "hops_s": hops * setting.served * setting.copy_s,
    }
    return asdict(setting) | medians | bounds | {"rows": rows, "killed": killed}


def _hops(sources: dict[str, str], name: str) -> int:
    hops = 1
    while source := sources[name]:
        hops, name = hops + 1, source
    return hops


COLUMNS = {  # heading -> key of the row
    "nodes": "nodes",
    "fanout": "fanout",
    "hops": "hops",
    "seconds": "seconds",
    "one copy": "copy_s",
    "its links": "links_s",
    "hop by hop": "hops_s",
    "hub's copies": "hub_copies",
}


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    values = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS.values()]
    text = "  ".join(f"{value:>{len(heading)}}" for heading, value in zip(COLUMNS, values, strict=True))
    if row["killed"]:
        text += f"   killed: {row['killed']['seconds']:.2f} s, {row['killed']['received_copies']:.2f} copies a node"
    return text

"""Several nodes on one machine: network namespaces behind one bridge, each of which can send at a given rate.

      namespace 0      namespace 1      ...       each with an address of its own, and nothing else in common
          │ tc: RATE       │ tc: RATE
          └────── bridge ──┴──────────────        in a namespace of its own

Needs root, `ip`, `tc` and `unshare` (apt-get install iproute2 util-linux).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from sgpo_async.errors import SgpoError

COMMAND_S = 60.0
LATENCY_MS = 50  # that a packet may wait in the queue of its sender


@dataclass(frozen=True)
class Namespace:
    """One node."""

    name: str
    address: str
    device: str = "eth0"

    @property
    def prefix(self) -> list[str]:
        """What precedes a command that uses this node's network."""
        return ["ip", "netns", "exec", self.name]

    @property
    def isolated(self) -> list[str]:
        """What precedes a command that sees no process outside, as on a machine of its own.

        Torch RPC copies from process to process, past the network, where it can.
        """
        return [*self.prefix, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

    def sent(self) -> int:
        """Bytes that this node has sent so far, with all headers."""
        (device,) = json.loads(_output("ip", "-n", self.name, "-j", "-s", "link", "show", "dev", self.device))
        return int(device["stats64"]["tx"]["bytes"])


def why_not() -> str:
    """Why no namespaces can be made here; "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc", "unshare") if shutil.which(program) is None]
    return f"network namespaces need {' and '.join(missing)} (apt-get install iproute2 util-linux)" if missing else ""


@contextlib.contextmanager
def network(count: int, *, mbit_per_s: float = 0.0) -> Iterator[list[Namespace]]:
    """Make `count` nodes; each sends at most `mbit_per_s` in all (0: no limit). Raises SgpoError if that cannot be."""
    if reason := why_not():
        raise SgpoError(reason)
    mark = uuid.uuid4().hex[:6]
    switch, nodes = f"sgpo-{mark}-switch", [Namespace(f"sgpo-{mark}-{i}", f"10.78.0.{i + 1}") for i in range(count)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *(node.name for node in nodes)):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, node in enumerate(nodes):
            _connect(node, switch, f"port{number}")
            if mbit_per_s:
                _limit(node, mbit_per_s)
        yield nodes


def _connect(node: Namespace, switch: str, port: str) -> None:
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", node.device, "netns", node.name)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.device)
    for device in (node.device, "lo"):
        _ip("-n", node.name, "link", "set", device, "up")


def _limit(node: Namespace, mbit_per_s: float) -> None:
    burst = max(32_000, int(mbit_per_s * 1e6 / 8 / 250))  # what is sent within one tick of the kernel
    rate = ("rate", f"{mbit_per_s}mbit", "burst", str(burst), "latency", f"{LATENCY_MS}ms")
    _output("tc", "-n", node.name, "qdisc", "add", "dev", node.device, "root", "tbf", *rate)


def _ip(*words: str) -> None:
    _output("ip", *words)


def _output(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        raise SgpoError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout

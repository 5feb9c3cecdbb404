"""`sgpo-async bench transport`: rollouts per second from producer processes into a consumer, by several ways.

    zeromq, no acks      prepared frames by pyzmq alone, as fast as they can be sent
    zeromq               the same, and each is acknowledged with the bytes of our acknowledgement
    records              the same frames and acknowledgements by our transport and codec: the consumer gets records
    hub; hub, journal    the whole hub: leases, checks, ledger, batches, shards to a learner; with its journal on disk
    arrays to records    as "records", but the producer encodes each record
    msgpack lists        a MessagePack map in which arrays are lists, made arrays again by the consumer
    transferqueue N      TransferQueue, N rollouts a call      ray N    Ray, N rollouts an object (`bench.peer_worker`)

The settings take turns, each in processes of its own that rest meanwhile. A figure is the median of its turns, with the
smallest and the largest; a ratio is computed within each turn.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from sgpo_async import __version__
from sgpo_async.bench.figures import header, load, machine, publish, ratio, spread, versions_elsewhere
from sgpo_async.bench.hub_ingest import rollout_of
from sgpo_async.errors import DeadlineExceeded, SgpoError
from sgpo_async.wire import encode
from sgpo_async.wire.records import PROTOCOL

OURS = (
    "zeromq, no acks",
    "zeromq",
    "records",
    "hub",
    "hub, journal",
    "arrays to records",
    "msgpack lists",
)
PEERS = ("transferqueue 16", "transferqueue 256", "ray 1", "ray 16", "ray 256")
RATIOS = (
    ("records", "zeromq", 0.6),
    ("hub", "zeromq", 0.6),
    ("hub, journal", "zeromq", 0.6),
    ("arrays to records", "msgpack lists", 3.0),
    *(("arrays to records", peer, 3.0) for peer in PEERS),
)  # of, to, and the bar that docs/performance.md has for it
NO_PEERS = "without TransferQueue and Ray: --peers PYTHON names an environment that has them (make peers)"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tokens: int = 500
    producers: int = 1
    seconds: float = 2.0  # of one turn
    turns: int = 7
    seed: int = 0


QUICK = Sizes(seconds=0.5, turns=5)
WARM_S = 1.0
WAIT_S = 120.0  # for a setting to start


class Worker:
    """The processes of one setting, or those of all peers."""

    def __init__(self, program: Sequence[str], name: str, sizes: Sizes) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [*program, name, str(sizes.tokens), str(sizes.producers), str(sizes.seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def rate(self, setting: str, seconds: float) -> float:
        """Rollouts per second of one turn. Raises SgpoError if the processes have ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(f"{seconds} {setting}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SgpoError(f"bench transport: the processes of {setting} have ended; their last lines are above")
        return float(answer)

    def close(self) -> None:
        """End the processes, by the end of their standard input."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise DeadlineExceeded(f"bench transport: {self._name}", "end", WAIT_S) from None


def run_bench_transport(*, sizes: Sizes, peers: str, to: Path) -> int:
    """Measure, print the table, and write it with all figures into the folder `to`.

    Args:
        peers: the Python of an environment with TransferQueue and Ray; "": leave them out.

    Raises SgpoError if a process fails.
    """
    settings = [*OURS, *(PEERS if peers else ())]
    known = versions(peers)
    loads = [load()]
    rates = measure(settings, sizes, peers)
    loads.append(load())
    report = report_of(rates, sizes) | {"machine": machine(), "versions": known, "load": loads}
    publish("transport", to, table(report, missing="" if peers else NO_PEERS), report)
    return 0


def measure(settings: Sequence[str], sizes: Sizes, peers: str) -> dict[str, list[float]]:
    """Rollouts per second of each turn."""
    rates: dict[str, list[float]] = {setting: [] for setting in settings}
    with contextlib.ExitStack() as stack:

        def start(program: Sequence[str], name: str) -> Worker:
            worker = Worker(program, name, sizes)
            stack.callback(worker.close)
            return worker

        workers = {
            setting: start([sys.executable, "-m", "sgpo_async.bench.worker_transport"], setting)
            for setting in settings
            if setting not in PEERS
        }
        if peers:
            workers |= dict.fromkeys(PEERS, start([peers, str(Path(__file__).with_name("peer_worker.py"))], "all"))
        for setting, worker in workers.items():
            worker.rate(setting, WARM_S)  # also waits until it has started
        for turn in range(sizes.turns):
            print(f"turn {turn + 1} of {sizes.turns} ...", file=sys.stderr, flush=True)
            for setting, worker in workers.items():
                rates[setting].append(worker.rate(setting, sizes.seconds))
    return rates


def report_of(rates: Mapping[str, Sequence[float]], sizes: Sizes) -> dict[str, Any]:
    """All figures: rates, bytes of a rollout, and the ratios that have a bar."""
    frames = encode(rollout_of(sizes.tokens, sizes.seed))
    ratios = [
        ratio(one, other, bar, (rates[one], rates[other]))
        for one, other, bar in RATIOS
        if one in rates and other in rates
    ]
    return {
        "sizes": vars(sizes),
        "bytes": sum(map(len, frames)),
        "frames": len(frames),
        "rollouts_per_s": {setting: spread(values) for setting, values in rates.items()},
        "ratios": ratios,
    }


def table(report: Mapping[str, Any], *, missing: str) -> list[str]:
    """The lines of the table."""
    sizes = report["sizes"]
    about = (
        f"rollouts of {sizes['tokens']} tokens, {report['bytes']} bytes in {report['frames']} frames; producers: "
        f"{sizes['producers']}; turns: {sizes['turns']} of {sizes['seconds']:g} s; seed {sizes['seed']}"
    )
    lines = [
        *header(report, about),
        "",
        f"{'rollouts a second':>20} {'median':>8} {'least':>8} {'most':>8} {'MB/s':>7}",
    ]
    for setting, found in report["rollouts_per_s"].items():
        megabytes = found["median"] * report["bytes"] / 1e6
        lines.append(
            f"{setting:>20} {found['median']:>8.0f} {found['low']:>8.0f} {found['high']:>8.0f} {megabytes:>7.1f}"
        )
    lines += ["", f"{'ratio':>38} {'median':>8} {'least':>8} {'most':>8} {'bar':>5}"]
    for found in report["ratios"]:
        name = f"{found['of']} / {found['to']}"
        met = "" if found["median"] >= found["bar"] else "  below"
        lines.append(
            f"{name:>38} {found['median']:>8.2f} {found['low']:>8.2f} {found['high']:>8.2f} {found['bar']:>5g}{met}"
        )
    return [*lines, *(["", missing] if missing else [])]


def versions(peers: str) -> dict[str, str]:
    """Versions of all that takes part."""
    known = {
        "sgpo-async": f"{__version__} (protocol {PROTOCOL})",
        "Python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
        "numpy": np.__version__,
    }
    if not peers:
        return known
    names = ("TransferQueue", "ray", "torch", "tensordict")
    return known | versions_elsewhere(peers, *names, given=f"--peers {peers}", remedy="make peers makes one")

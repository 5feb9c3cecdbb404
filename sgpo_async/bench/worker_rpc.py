"""Torch RPC and nothing else, for comparison with a session: `python -m sgpo_async.bench.worker_rpc RANK FILE MB`.

Rank 1 fetches MB x 2^20 bytes from rank 0, in buckets of the usual size with the usual number in flight, for each line
on standard input, and prints the seconds that it took.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any

os.environ.setdefault("TP_SOCKET_IFNAME", "lo")

import torch
from torch.distributed import rpc

from sgpo_async.session.pull import IN_FLIGHT
from sgpo_async.weights.writer import BUCKET_BYTES

BUCKET = torch.ones(BUCKET_BYTES, dtype=torch.uint8)
START_S = 300.0


def bucket() -> torch.Tensor:
    """The answer of rank 0: always the same bytes, which nothing has to read or check."""
    return BUCKET


def fetch(count: int) -> float:
    """Seconds for `count` buckets."""
    began = time.monotonic()
    in_flight: deque[Any] = deque()
    for _ in range(count):
        in_flight.append(rpc.rpc_async("0", bucket))
        if len(in_flight) == IN_FLIGHT:
            in_flight.popleft().wait()
    while in_flight:
        in_flight.popleft().wait()
    return time.monotonic() - began


def main(rank: str, file: str, mbytes: str) -> int:
    """Join the world of two by a file that does not exist yet; rank 1 fetches."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{file}", rpc_timeout=START_S, _transports=["uv"])
    rpc.init_rpc(rank, rank=int(rank), world_size=2, rpc_backend_options=options)
    count = int(mbytes) * 2**20 // BUCKET_BYTES
    if rank == "1":
        for _ in sys.stdin:
            print(fetch(count), flush=True)
    rpc.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

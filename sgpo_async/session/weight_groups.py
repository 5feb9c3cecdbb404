"""Weight-update groups, as the actor uses them: rank 0 is the weight sender, the others are SGLang servers.

Create a group for some servers (SIZE = 1 + tp * servers), for as long as they receive versions together. NAME must be
new each time: SGLang keeps the name of a failed group.

    open(NAME, backend=, world_size=SIZE)    -> host, port
  ┌ join(NAME)                               at the same time as the POSTs: each waits for the others
  └ POST /init_weights_update_group {"master_address": host, "master_port": port, "rank_offset": 1 + tp * number,
          "world_size": SIZE, "group_name": NAME, "backend": backend}     to each server, number 0, 1, ...

For each version, the POSTs to each server:

    plan(version)                            -> BroadcastPlan, the same for all servers
    POST /pause_generation, POST /begin_weight_update {}
  ┌ broadcast(NAME, plan)                    at the same time as the POSTs
  └ for b in plan.broadcasts, one after another:
        POST /update_weights_from_distributed {"names": b.names, "dtypes": b.dtypes, "shapes": b.shapes,
              "group_name": NAME, "load_format": "flattened_bucket", "flush_cache": true only for the last}
    when both have succeeded: POST /end_weight_update {}, POST /update_weight_version
    POST /weights_checker, whose checksums must equal those of
    compute(version, ...)                    requested earlier, so that it runs during the broadcast

At the end: close(NAME), POST /destroy_weights_update_group.

When a future of `join` or `broadcast` fails, rank 0 has already left the group. With gloo this ends the server's wait
by an error: its POST answers 400 (then POST /end_weight_update, if the update had begun). The server then holds the old
weights or a mixture of old and new ones, and must stay out of service until it has loaded a whole version, through a
new group or from the weight receiver. With nccl a server that waits for a dead rank 0 stays in its kernel until its own
watchdog ends it: restart it. When a POST fails or times out instead, call close(NAME): the future then fails at once.

A broadcast that has been sent may not have arrived: small tensors fit into the socket buffer of a dead server. Only the
responses of the server and its checksums prove the arrival.

A server that is not on loopback needs GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME, in its environment: the interface
towards the hub (`session.interface.interface_towards`). All this describes SGLang 0.5.23 and torch 2.13.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sgpo_async.session.rpc_client import RpcClient
from sgpo_async.weights.broadcast_plan import BroadcastPlan

Result = TypeVar("Result")


class WeightGroups:
    """The groups of one session's weight sender. All methods return at once; any thread may call them.

    A future fails with SessionError (a rank or the session is gone, or a timeout), Superseded (the version has been
    overwritten) or WeightsError; the message names the group and the phase.
    """

    def __init__(self, rpc: RpcClient, group_s: float) -> None:
        """`group_s` is the timeout of each phase, in seconds."""
        self._rpc, self._seconds = rpc, group_s

    def open(self, group: str, *, backend: str, world_size: int) -> Future[tuple[str, int]]:
        """Open a group; the result is host and port of rank 0's rendezvous. `backend` is gloo or nccl."""
        return self._rpc.request(
            "open", seconds=self._seconds, read=_address, group=group, backend=backend, world_size=world_size
        )

    def join(self, group: str) -> Future[None]:
        """Let rank 0 join; done when all ranks are connected (nccl connects only at the first broadcast)."""
        return self._rpc.request("join", seconds=self._seconds, group=group)

    def plan(self, version: int) -> Future[BroadcastPlan]:
        """Return the plan of a version: the tensors in each of its broadcasts."""
        return self._rpc.request("plan", seconds=self._seconds, read=BroadcastPlan.from_plain, version=version)

    def broadcast(self, group: str, plan: BroadcastPlan) -> Future[None]:
        """Let rank 0 send the version of `plan`; done when it has sent everything.

        If the tensors of the version differ from `plan`, it fails with WeightsError and nothing is sent.
        """
        return self._rpc.request(
            "broadcast", seconds=self._seconds, group=group, version=plan.version, fingerprint=plan.fingerprint
        )

    def compute(self, version: int, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Future[Result]:
        """Let the weight sender compute `function(tensors, *args, **kwargs)` on the tensors of a version.

        `tensors` is a Mapping by name, which reads each tensor into CPU memory on access. The function must be
        one of the weight sender's jobs (`WeightSender`); its arguments are of JSON types or dtypes of torch, and its
        result of JSON types. If the function raises an SgpoError, the future fails with it. The last result is cached
        for the next server that needs it.
        """
        job = base64.b64encode(pickle.dumps((function, args, kwargs))).decode()
        return self._rpc.request("compute", seconds=self._seconds, version=version, job=job)

    def close(self, group: str) -> None:
        """Let rank 0 leave; pending requests of the group fail. An unknown group is ignored."""
        self._rpc.request("close", seconds=self._seconds, group=group)


def _address(value: list[Any]) -> tuple[str, int]:
    host, port = value
    return host, port

"""Weight-update groups as the actor sees them: rank 0 is the link, the other ranks are one SGLang server.

To give a server, once, a group of its own (NAME new each time: SGLang never forgets one that failed):

    open(NAME, backend=, world_size=1 + tp)  -> host, port
  ┌ join(NAME)                               both at the same time: each waits for the other
  └ POST /init_weights_update_group {"master_address": host, "master_port": port, "rank_offset": 1,
          "world_size": 1 + tp, "group_name": NAME, "backend": backend}

For each version:

    plan(version)                            -> BroadcastPlan, the same for all servers
    POST /pause_generation, POST /begin_weight_update {}
  ┌ broadcast(NAME, plan)                    both at the same time
  └ for b in plan.broadcasts, one after another:
        POST /update_weights_from_distributed {"names": b.names, "dtypes": b.dtypes, "shapes": b.shapes,
              "group_name": NAME, "load_format": "flattened_bucket", "flush_cache": whether it is the last}
    when both have succeeded: POST /end_weight_update {}, POST /update_weight_version
    POST /weights_checker, whose checksums have to be those of
    compute(version, ...)                    asked for before, so that it runs beside the broadcast

and in the end close(NAME), POST /destroy_weights_update_group.

When a future of `join` or `broadcast` fails, rank 0 has left the group already. With gloo this ends the server's own
wait by an error: its POST answers 400 (then POST /end_weight_update, if begun) and the server holds either the old
weights or a mixture: out of service until a whole version is loaded, by a new group or a pull by the receiver. With
nccl a server that waits for a dead rank 0 stays in its kernel until its own watchdog ends it: restart it. When
a POST fails or runs into its deadline instead, close(NAME): the future then fails at once.

That a broadcast has been sent says nothing about its arrival: small tensors fit into a dead server's socket. Only the
answers of the server and its checksums tell.

A server beyond loopback needs GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME, in its environment: the interface towards the
hub (`session.interface.interface_towards`). All this is as in SGLang 0.5.23 and torch 2.13.
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
    """Groups with the link of one session. Methods return at once and may be called by any thread.

    Futures end with SessionError (a member or the session is gone, or a deadline has passed), Superseded (the version
    has been overwritten) or WeightsError; the message names group and phase.
    """

    def __init__(self, questions: RpcClient, group_s: float) -> None:
        """`group_s` seconds for each phase."""
        self._questions, self._seconds = questions, group_s

    def open(self, group: str, *, backend: str, world_size: int) -> Future[tuple[str, int]]:
        """Host and port of the rendezvous, once rank 0 listens. `backend` is gloo or nccl."""
        return self._questions.ask(
            "open", seconds=self._seconds, read=_address, group=group, backend=backend, world_size=world_size
        )

    def join(self, group: str) -> Future[None]:
        """Have rank 0 join; done when the group stands (nccl connects only with the first broadcast)."""
        return self._questions.ask("join", seconds=self._seconds, group=group)

    def plan(self, version: int) -> Future[BroadcastPlan]:
        """What the broadcasts of a version consist of."""
        return self._questions.ask("plan", seconds=self._seconds, read=BroadcastPlan.from_plain, version=version)

    def broadcast(self, group: str, plan: BroadcastPlan) -> Future[None]:
        """Have rank 0 send the version of `plan`; done when it has sent everything.

        Nothing is sent if the version has other tensors than `plan` says (WeightsError).
        """
        return self._questions.ask(
            "broadcast", seconds=self._seconds, group=group, version=plan.version, fingerprint=plan.fingerprint
        )

    def compute(self, version: int, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Future[Result]:
        """`function(tensors, *args, **kwargs)` of a version's tensors, done by the link.

        `tensors` is a Mapping by name; each is read, to the CPU, when it is asked for. The function stands in a module
        that the link can import and takes what can be pickled; its result is of JSON types. An SgpoError that it
        raises ends the future. The last result is kept, for the next server that needs the same.
        """
        job = base64.b64encode(pickle.dumps((function, args, kwargs))).decode()
        return self._questions.ask("compute", seconds=self._seconds, version=version, job=job)

    def close(self, group: str) -> None:
        """Have rank 0 leave; what is under way in the group fails. An unknown group is ignored."""
        self._questions.ask("close", seconds=self._seconds, group=group)


def _address(value: list[Any]) -> tuple[str, int]:
    host, port = value
    return host, port

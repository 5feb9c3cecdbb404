"""A session connects one inference node to one learner: a Torch RPC world of two processes.

      beside the hub                                         on the inference node
    hub ── LinkProcess ──▶ link (rank 0) ◀── Torch RPC ──▶ node (rank 1) ◀── NodeProcess ── actor
                              │ reads                          │ writes
                        the learner's store              the actor's local store

Both processes are fresh for every session, because a Torch RPC world can neither lose a member nor begin anew
in a living process. When one of them dies, the session is over and nobody else is touched. The two handles
are torch-free.

On another road weights go from the link straight to SGLang servers, by broadcast: see `session.weight_groups`.
"""

from sgpo_async.session.link_process import LinkDown, LinkEvent, LinkProcess, LinkUp
from sgpo_async.session.node_process import (
    NodeAnnounced,
    NodeControl,
    NodeDown,
    NodeEvent,
    NodeProcess,
    NodeRejected,
    NodeWeights,
)
from sgpo_async.session.settings import Deadlines
from sgpo_async.session.weight_groups import WeightGroups

__all__ = [
    "Deadlines",
    "LinkDown",
    "LinkEvent",
    "LinkProcess",
    "LinkUp",
    "NodeAnnounced",
    "NodeControl",
    "NodeDown",
    "NodeEvent",
    "NodeProcess",
    "NodeRejected",
    "NodeWeights",
    "WeightGroups",
]

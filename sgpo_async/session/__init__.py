"""A session connects one inference node to one learner: a Torch RPC world of two processes.

      beside the hub                                         on the inference node
    hub ── WeightSender ──▶ link (rank 0) ◀── Torch RPC ──▶ node (rank 1) ◀── WeightReceiver ── actor
                              │ reads                          │ writes
                        the learner's store              the actor's local store

Both processes are fresh for every session, because a Torch RPC world can neither lose a member nor begin anew
in a living process. When one of them dies, the session is over and nobody else is touched. The two handles
are torch-free.

On another road weights go from the link straight to SGLang servers, by broadcast: see `session.weight_groups`.
"""

from sgpo_async.session.receiver_process import (
    NodeControl,
    ReceiverDown,
    ReceiverEvent,
    VersionAnnounced,
    VersionReceived,
    VersionRejected,
    WeightReceiver,
)
from sgpo_async.session.sender_process import SenderDown, SenderEvent, SenderUp, WeightSender
from sgpo_async.session.settings import Deadlines
from sgpo_async.session.weight_groups import WeightGroups

__all__ = [
    "Deadlines",
    "NodeControl",
    "ReceiverDown",
    "ReceiverEvent",
    "SenderDown",
    "SenderEvent",
    "SenderUp",
    "VersionAnnounced",
    "VersionReceived",
    "VersionRejected",
    "WeightGroups",
    "WeightReceiver",
    "WeightSender",
]

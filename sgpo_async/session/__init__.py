"""A session carries the weights from one store to another: by Torch RPC in a world of two processes.

    hub, actor or learner                                      actor, or the hub of a learner on another machine
      └─ WeightSender ──▶ weight sender ◀── Torch RPC ──▶ weight receiver ◀── WeightReceiver ─┘
                          (rank 0)                        (rank 1)
                            │ reads                         │ writes
                          its store                       its store ──▶ other actors (SharedStore, WeightSender)

Every session starts two fresh processes, because a Torch RPC world cannot survive the loss of a member and a process
cannot join a second world. When one of the two dies, this session is over; other sessions continue. The handles
`WeightSender` (used by the hub, by actors that pass the weights on, and by a learner on another machine than the hub's)
and `WeightReceiver` (used by actors, and by the hub of such a learner) do not import torch.

Both processes must know a secret that is new for each session (`session.secret`): the weight sender's handle makes it,
and the other side gets it over the authenticated connection between the hub and the member.

On other roads the two processes are connected by ZeroMQ (`session.socket_world`), or there is no weight sender, but a
folder (`session.folder_world`), into which a weight uploader of the hub copies every version.

Weights can also go by broadcast from the weight sender directly to SGLang servers: see `session.weight_groups`.
"""

from sgpo_async.session.receiver_process import (
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

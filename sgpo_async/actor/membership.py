"""An actor's membership in a run: the connection to the hub, and the weight session that belongs to it.

    absent ── Hello (every so often) ──▶ Welcome ──▶ serving
       ▲                                                │
       └── connection lost, session down, refused ◀─────┘

The weights come from the hub or from another actor, as the hub's Welcome says, over a session; or another actor of this
machine has them already (`SharedStore`). An actor that another one could not serve asks for a session with the hub.

The actor may be absent for `timeout_s`, and keeps working meanwhile. So it survives a restart of the hub and a failure
of the network. A membership that ends within PROVEN_S and before weights have arrived counts as absence: an actor whose
sessions always fail gives up, too. Each membership has a weight receiver of its own, because a Torch RPC world cannot
be joined twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sgpo_async.actor.shared_store import SharedStore
from sgpo_async.errors import DeadlineExceeded, HubAbsent, Refusal
from sgpo_async.logs import fields
from sgpo_async.session import ReceiverEvent, VersionAnnounced, VersionReceived, WeightReceiver
from sgpo_async.transport import Mailbox
from sgpo_async.wire.records import Hello, Refused, Welcome

log = logging.getLogger(__name__)

REPEAT_S = 10.0  # between two Hellos without an answer; the hub starts a weight sender before it answers
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # after a Hello that was refused or led to a short membership
PROVEN_S = 30.0  # a membership that lasts longer is no failure


class Membership:
    """Says Hello until the hub answers Welcome, and again whenever the membership is lost.

    Args:
        mailbox: the connection to the hub.
        hello: the actor's name and tokenizer.
        node: the weight receiver of the first membership.
        start_node: starts a weight receiver for a later membership.
        timeout_s: how long the actor may be without a hub.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        hello: Hello,
        *,
        node: WeightReceiver,
        start_node: Callable[[], WeightReceiver],
        timeout_s: float,
    ) -> None:
        self._mailbox, self._dealer, self._hello = mailbox, mailbox.dealer, hello
        self._start_node, self._timeout_s = start_node, timeout_s
        self.node: WeightReceiver | SharedStore = node
        self.serving = False
        self._run_id = ""
        self._connections = mailbox.connections
        self._absent_since = time.monotonic()
        self._hello_at = 0.0  # time of the next Hello
        self._serving_since = 0.0
        self._proven = False  # weights have arrived in this membership
        self._source = ""  # the actor that serves the weights; "": the hub
        self._direct = False  # another actor could not serve them
        self._failures = 0  # refusals and short memberships in a row
        self._last_failure = ""

    def advance(self, holds: Sequence[tuple[int, int]]) -> None:
        """Notice a lost connection; say Hello when it is due. `holds`: (task, attempt) of the leases in progress.

        A connection that is away ends the membership, too: weights may still come from another actor, or be in its
        store, so nothing else tells a member that its hub has gone or refuses its key.

        Raises HubAbsent after `timeout_s` without a hub, HubError if the hub refuses the connection.
        """
        if self._mailbox.connections != self._connections or (self.serving and not self._dealer.connected):
            self._connections = self._mailbox.connections
            self.lost("the connection to the hub was lost", unserved=False)
        if self.serving:
            return
        self._dealer.check_refused()
        now = time.monotonic()
        if now - self._absent_since > self._timeout_s:
            because = self._mailbox.mismatch or self._last_failure
            raise HubAbsent(
                f"hub {self._dealer.address}: not a member for {self._timeout_s:g} s"
                + (f", because {because}" if because else "; check that the hub runs")
            )
        if now >= self._hello_at and self._dealer.connected:
            pairs = np.array(holds, np.int32).reshape(-1)
            self._mailbox.send(replace(self._hello, holds=pairs, direct=self._direct))
            self._hello_at = now + REPEAT_S

    def welcomed(self, welcome: Welcome) -> bool:
        """Join the weight session; False if the hub belongs to another run than before."""
        if self._run_id not in ("", welcome.run_id):
            return False
        self._run_id = welcome.run_id
        if self.serving:
            self._replace_node()  # the hub has started another weight sender: a Hello was repeated
        self._use(welcome)
        self.serving, self._serving_since, self._proven = True, time.monotonic(), False
        self._source = welcome.source
        about = fields(event="joined", source=self._source)
        log.info("joined the run at %s; weights from %s", self._dealer.address, self._source or "the hub", extra=about)
        return True

    def _use(self, welcome: Welcome) -> None:
        """Get the weights from where the hub says."""
        if welcome.store:
            stop_node(self.node)
            self.node = SharedStore(welcome.store)
            return
        if isinstance(self.node, SharedStore):
            self.node = self._start_node()
        if welcome.folder:
            self.node.open_folder(welcome.folder)
            return
        self.node.connect(welcome.session_host, welcome.session_port, welcome.session_secret)

    def refused(self, refusal: Refused) -> None:
        """Schedule another Hello. Raises Refusal if retrying cannot help."""
        reason = f"refused {self._hello.name}: {refusal.reason}"
        if refusal.final:
            raise Refusal(f"hub {self._dealer.address}: {reason}", final=True)
        if reason != self._last_failure.removeprefix("it "):
            log.warning("hub %s: %s; trying again for up to %g s", self._dealer.address, reason, self._timeout_s)
        if self.serving:
            self.lost(f"it {reason}")
        else:
            self._failed(f"it {reason}")

    def lost(self, reason: str, *, unserved: bool = True) -> None:
        """Start to join again, with a new weight receiver, because the connection or the session is lost.

        `unserved`: if no weights have arrived, this is the fault of the actor that was to serve them.
        """
        self._hello_at = now = time.monotonic()
        if not self.serving:
            return
        log.warning("%s; joining again", reason)
        self.serving = False
        could_read = isinstance(self.node, SharedStore) and self.node.could_read
        self._direct |= unserved and bool(self._source) and not (self._proven or could_read)
        if self._proven or now - self._serving_since > PROVEN_S:
            self._absent_since, self._failures, self._last_failure = now, 0, ""
        else:
            self._failed(reason)
            if self._failures == 1:
                self._hello_at = now  # connections may be lost at any time; only repeated losses are suspicious
        self._replace_node()

    def _failed(self, reason: str) -> None:
        """Wait longer before the next Hello."""
        self._last_failure = reason
        self._hello_at = time.monotonic() + BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1

    def session_down(self, reason: str) -> None:
        """Replace the weight receiver, which has ended, and join again."""
        if self.serving:
            self.lost(reason)
        else:
            self._replace_node()

    def _replace_node(self) -> None:
        """End the weight receiver and start another one, unless the next Welcome probably names a store, too."""
        stop_node(self.node)
        if not isinstance(self.node, SharedStore):
            self.node = self._start_node()

    def node_events(self) -> list[ReceiverEvent]:
        """Events of the weight receiver since the last call."""
        events = list(self.node.poll())
        self._proven |= any(isinstance(event, VersionReceived | VersionAnnounced) for event in events)
        return events

    def close(self) -> None:
        """End the weight receiver."""
        stop_node(self.node)


def stop_node(node: WeightReceiver | SharedStore) -> None:
    """End what gets the weights; that a process ends late is only logged."""
    try:
        node.stop()
    except DeadlineExceeded as error:  # on a busy machine, or while the disk does not answer
        log.warning("%s", error)

"""A process asks the hub for the configuration of the run, before it joins."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from sgpo_async.errors import HubAbsent, HubError
from sgpo_async.transport.mailbox import Mailbox
from sgpo_async.wire.records import Settings, SettingsRequest, Stop

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0


def request_settings(
    mailbox: Mailbox, *, name: str, timeout_s: float, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """The run's configuration as plain data (`config.to_plain`); asks again every second.

    Returns None if the hub says that the run is over, or once `stopped()`.

    Args:
        name: of this process, for its log.

    Raises HubAbsent if no hub answers within `timeout_s`, HubError if it refuses the connection, or is of another
    release.
    """
    address = mailbox.dealer.address
    began, asked = time.monotonic(), -math.inf
    while not stopped():
        now = time.monotonic()
        if now - began > timeout_s:
            raise HubAbsent(
                f"hub {address}: no Settings within {timeout_s:g} s; check that the hub runs, and the address"
            )
        if now - asked > ASK_AGAIN_S:
            if asked == began:
                log.info("%s: no answer from %s yet; waiting up to %g s", name, address, timeout_s)
            asked = began if asked == -math.inf else now
            mailbox.send(SettingsRequest())
        for message in mailbox.receive(0.1):
            if isinstance(message, Settings):
                return message.settings
            if isinstance(message, Stop):
                return None
        if mailbox.mismatch:
            raise HubError(f"hub {address}: {mailbox.mismatch}")
        mailbox.dealer.check_refused()
    return None

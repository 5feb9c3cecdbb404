"""ZeroMQ endpoints, in-memory endpoints for tests, typed mailboxes, CURVE keys and at-least-once delivery."""

from sgpo_async.transport.base import DealerEnd, RouterEnd
from sgpo_async.transport.dealer import Dealer
from sgpo_async.transport.keys import create_keys
from sgpo_async.transport.mailbox import Mailbox, RouterMailbox
from sgpo_async.transport.memory import MemoryDealer, MemoryRouter, memory_pair
from sgpo_async.transport.reliable import ReliableSender
from sgpo_async.transport.router import Router
from sgpo_async.transport.settings import request_settings

__all__ = [
    "Dealer",
    "DealerEnd",
    "Mailbox",
    "MemoryDealer",
    "MemoryRouter",
    "ReliableSender",
    "Router",
    "RouterEnd",
    "RouterMailbox",
    "create_keys",
    "memory_pair",
    "request_settings",
]

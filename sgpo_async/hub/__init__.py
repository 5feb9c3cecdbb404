"""The hub: knows the members, leases tasks, keeps the ledger and the buffer, forms batches."""

from sgpo_async.hub.core import HubCore

__all__ = ["HubCore"]

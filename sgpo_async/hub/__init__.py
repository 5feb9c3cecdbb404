"""The hub: knows the members, leases tasks, keeps the ledger and the buffer, forms batches.

service ─▶ loop ─▶ core ─┬─ door, actors, world      who is here
(process)  (I/O)  (pure) ├─ training ─┬─ admission, balance, figures
                         ├─ evaluation ┴─ leases (with ledger and buffer), work
                         └─ snapshot, status
"""

from sgpo_async.hub.core import HubCore
from sgpo_async.hub.service import serve

__all__ = ["HubCore", "serve"]

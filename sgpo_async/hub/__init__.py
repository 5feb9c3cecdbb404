"""The hub: manages the members, leases tasks to actors, keeps the ledgers and the buffer, and forms batches.

service ─▶ loop ─▶ core ─┬─ validation, actors, learner_ranks      which members are connected
(process)  (I/O)  (pure) ├─ training ─┬─ admission, balance        how many tasks, which groups on which rank
                         ├─ evaluation┤
                         │            ├─ leases ── ledger          tasks from dispatch to training
                         │            └─ batch_metrics             lag and pass rates
                         ├─ rollout_checks                         rollouts and reports compared with their lease
                         ├─ stragglers, stall                      slow actors; who holds up a run
                         └─ snapshot, status                       state for checkpoints and for displays

`events` defines what `loop` passes to `core` and what it gets back. `journal` stores the events, and `recovery`
rebuilds a killed hub's core from them.
"""

from sgpo_async.hub.core import HubCore
from sgpo_async.hub.service import serve

__all__ = ["HubCore", "serve"]

"""Throughput of one configuration in several settings, on the same machine, one after another.

generation     engines alone, one per actor, always busy: the upper bound of the actors
learner        ranks alone, which update on one real batch again and again: the upper bound of the learner
synchronous    the colocated loop: every rank generates its part of a batch, all update, all load the new weights
asynchronous   the whole system, as `sgpo-async local` runs it
servers        with engine.kind=sglang, in place of the first three: plain requests to the servers, the actor on them,
               and the pause of a weight update

measure.py              starts the processes of each setting and reads one JSON line from each
worker_*.py             those processes
synchronous_actor.py    an engine that generates whole groups without a hub
transport.py            rollouts into the hub, against ZeroMQ alone and against other projects
engine.py               the embedded engine against `generate` of transformers
pack.py                 rows and their division against padded micro-batches
loss.py                 fused losses against all logits at once, and Liger's
trl.py                  the demo against TRL's GRPOTrainer
figures.py              what the reports of these parts have in common
cost.py                 the GPU-hours of a whole run, calculated from such figures
"""

from sgpo_async.bench.measure import run_bench

__all__ = ["run_bench"]

"""Throughput of one configuration in several settings, on the same machine, one after another.

generation     engines alone, one per actor, fed without pause: the ceiling of the actors
learner        ranks alone, updating on the same real batch again and again: the ceiling of the learner
synchronous    the colocated loop: every rank generates its part, then all update, then all load the weights
asynchronous   the whole system as `sgpo-async local` runs it
servers        engine.kind=sglang, in place of the first three: a bare load on the servers, the actor on the same, and
               the pause of an update

measure.py starts each setting as processes of its own and reads one JSON line from each
worker_*.py are those processes; rollouts.py makes groups without a hub
cost.py tells a whole run's GPU-hours from such figures, by arithmetic
"""

from sgpo_async.bench.measure import run_bench

__all__ = ["run_bench"]

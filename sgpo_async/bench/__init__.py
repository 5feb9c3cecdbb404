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
cost.py                 the GPU-hours of a whole run, calculated from such figures
"""

from sgpo_async.bench.measure import run_bench

__all__ = ["run_bench"]

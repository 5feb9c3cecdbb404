"""The inference side: leases in, rollouts out, weights in flight.

run.py       an actor's life: settings, engine, sessions
service.py   one session: the loop
group.py     one lease: pure bookkeeping
"""

"""The inference side: leases in, rollouts out, weights in flight.

run.py       an actor's life: settings, engine, sessions
service.py   one session: the loop
rollout/     (a package of its own) the rollout loop
"""

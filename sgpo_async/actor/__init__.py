"""The inference side: leases in, rollouts out, weights in flight.

run           an actor from start to end: settings, engine, one run after another
membership    the connection to the hub, renewed whenever it is lost
service       the actor's work for one run: the loop
senders       the weight senders for actors on other machines
shared_store  the weight store of another actor on this machine

The rollout loop is a package of its own, `sgpo_async.rollout`.
"""

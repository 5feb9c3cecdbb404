"""From a leased task to judged rollouts: the loop that actors, benchmarks of throughput and evaluations share.

group        the state of one lease: which rollouts are requested, generated, judged, finished (no I/O)
partial      finished rollouts and the tokens of unfinished ones, which another actor can continue (no torch)
sampler      the loop: requests into an engine, completions to the verifiers, rollouts out
completed    all rollouts of one task, as the hub keeps them (no torch)
"""

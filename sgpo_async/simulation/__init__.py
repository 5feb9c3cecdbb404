"""Runs in virtual time: the hub's real core around simulated inference nodes and a simulated learner.

rates       how fast engines and learner are: the stated model
workload    lengths and rewards of the rollouts
node        a simulated inference node      learner    a simulated learner      world    a whole run
"""

from sgpo_async.simulation.rates import EngineRates, LearnerRates, Lengths
from sgpo_async.simulation.world import Outcome, Settings, generation_bound, simulate

__all__ = ["EngineRates", "LearnerRates", "Lengths", "Outcome", "Settings", "generation_bound", "simulate"]

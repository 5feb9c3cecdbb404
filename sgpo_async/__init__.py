"""Asynchronous actor-learner post-training by Strategy-Guided Policy Optimization (SGPO)."""

__version__ = "0.1.0"

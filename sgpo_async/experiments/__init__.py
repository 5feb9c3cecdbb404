"""Methods x settings x seeds with an equal sample budget: who learns best, at which lag, from how little.

    configs/experiments/NAME.yaml ─▶ spec ─▶ bases ─▶ trials ─▶ pool (one process per core) ─▶ results/ID.json
                                                        ▲                                          │
                                                        └── tune: the best learning rate ◀─────────┤
                                                                             tables, figures ◀─────┘

A trial is one whole training run in one process: the learner's own step and the actor's own bookkeeping around one
embedded engine, with every rollout exactly `hub.max_lag` versions old. So lag is a setting and not an accident of the
machine, and many trials fit one machine. Results are files, one per trial: a second call does what is missing. They are
kept as one table, from which all pages can be written again without a trial (see `collection`).
"""

from sgpo_async.experiments.experiment import run_experiment

__all__ = ["run_experiment"]

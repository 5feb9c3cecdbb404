"""Experiments: methods x settings x seeds, compared at an equal sample budget.

    builtin:experiments/NAME ─▶ plan ─▶ bases ─▶ trials ─▶ pool (one process per core) ─▶ results/ID.json
                                                        ▲                                          │
                                                        └── tune: the best learning rate ◀─────────┤
                                                                             tables, figures ◀─────┘

A trial is one whole training run in one process: the learner's step and the rollout loop of the actor around one
embedded engine, with every rollout exactly `hub.max_lag` versions old. So the lag is a setting and does not depend on
the speed of the machine, and many trials fit one machine. Each trial writes one result file; a later call runs the
missing trials. `collection` stores all results in one table, and writes all pages again from it without a trial.
"""

from sgpo_async.experiments.experiment import run_experiment

__all__ = ["run_experiment"]

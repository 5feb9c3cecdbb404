"""TensorBoard, W&B and MLflow: each in a process of its own that follows the files of the run.

    learner, rank 0 ──▶ metrics.jsonl, samples.jsonl ─ ─ read as they grow ─ ─ ▶ tracker's process ──▶ tracker
           └── standard input: "finished" or "interrupted" at the end ──────────▶      │
           ◀── standard output: a failure, once; what is missing at the end ───────────┘

The files are the queue between the two. So a tracker that hangs, fails or dies cannot stop or slow training, nothing is
lost that a later attempt could write, and `sgpo-async track RUN` writes what is missing after the run.

    base.py      the protocol of a tracker; what is kept of it in runs/NAME/trackers/KIND.json
    follow.py    reads the files and writes to a tracker, again after a failure
    process.py   the process; its deadline
    children.py  the learner's side
"""

from sgpo_async.metrics.trackers.children import Trackers

__all__ = ["Trackers"]

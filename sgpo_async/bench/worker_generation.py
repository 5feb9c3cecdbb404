"""One engine alone: `python -m sgpo_async.bench.worker_generation CONFIG INDEX SECONDS [key=value ...]`."""

from __future__ import annotations

import json
import sys
import time

from sgpo_async.bench.synchronous_actor import SynchronousActor
from sgpo_async.config import load
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import load_model


def main(config: str, index: str, seconds: str, *words: str) -> None:
    """Generate one batch to warm up, then batches for about `seconds`; print tokens, problems and seconds."""
    run = load(config, words)
    actor = SynchronousActor(run)
    actor.load(0, dict(load_model(model_folder(run.model.path), device="cpu", dtype="float32").named_parameters()))
    batch = run.learner.problems_per_step
    first = int(index) * 10**6  # every engine has problems of its own
    actor.roll_out([actor.task(n) for n in range(first, first + batch)])
    tokens, problems, began = 0, 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < float(seconds):
        first += batch
        tokens += sum(
            len(rollout.tokens) for rollout in actor.roll_out([actor.task(n) for n in range(first, first + batch)])
        )
        problems += batch
    print(json.dumps({"tokens": tokens, "problems": problems, "seconds": elapsed}))


if __name__ == "__main__":
    main(*sys.argv[1:])

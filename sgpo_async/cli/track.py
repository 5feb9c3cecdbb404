"""`sgpo-async track`: write a run, or what is missing of it, to trackers: after a failure, or to one that it had not.

sgpo-async track runs/demo            # those of its configuration
sgpo-async track runs/demo wandb      # also of a run that did not name W&B
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FOLDER [TRACKER ...]."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the run, e.g. runs/demo")
    parser.add_argument("trackers", metavar="TRACKER", nargs="*", help="tensorboard, wandb or mlflow")


def run(args: argparse.Namespace) -> int:
    """Write, and print what each tracker has. Raises SgpoError if one cannot be written."""
    from sgpo_async.cli.resources import installed
    from sgpo_async.config.rules import require_one_of
    from sgpo_async.config.schema import TRACKERS
    from sgpo_async.errors import DataError, SgpoError
    from sgpo_async.metrics import read_metrics, read_summary
    from sgpo_async.metrics.trackers.follow import Follower, config_of, sole_writer

    if not (lines := read_metrics(args.folder)):
        raise DataError(f"{args.folder}: contains no metrics.jsonl with a finished step; give the folder of a run")
    kinds = args.trackers or (config_of(args.folder).get("learner") or {}).get("trackers") or ["tensorboard"]
    for kind in kinds:
        require_one_of("track: TRACKER", kind, TRACKERS)
        installed(kind, "track")
    summary = read_summary(args.folder)
    for kind in kinds:
        with sole_writer(args.folder, kind, patience_s=0.0) as alone:
            if not alone:
                raise SgpoError(
                    f"track: the run in {args.folder} goes on and writes to {kind} itself; wait for its end"
                )
            follower = Follower(kind, args.folder)
            follower.finish(finished=bool(summary) and not summary.get("interrupted"))
        if follower.failure:
            raise SgpoError(f"track: {kind} cannot be written ({follower.failure})")
        print(f"{kind}: has the {len(lines)} steps of {args.folder}" + (f"; {follower.note}" * bool(follower.note)))
    return 0

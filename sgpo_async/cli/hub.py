"""`sgpo-async hub`: the hub as a process of its own. Learners connect to it with --hub; it survives their crashes.

Killed and started again with the same command, it goes on from its journal.
"""

from __future__ import annotations

import argparse

from sgpo_async.cli.options import add_config, load_run, print_dry_run, say_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--dry-run]."""
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until the run is finished. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "hub", args.config, *args.overrides]])
        return 0
    from sgpo_async.cli.preflight import preflight
    from sgpo_async.cli.resources import check_start
    from sgpo_async.hub import serve

    check_start(settings, checkpoints=False)
    say_notes(preflight(settings, light=True))
    return serve(settings)

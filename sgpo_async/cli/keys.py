"""`sgpo-async keys`: key pairs for a hub that listens beyond loopback, for its learner and for its actors."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="created if it does not exist")


def run(args: argparse.Namespace) -> int:
    """Create the keys. Raises SgpoError."""
    from sgpo_async.transport.keys import create_keys

    create_keys(args.folder)
    print(f"keys: {args.folder}  (hub and learner: hub.keys={args.folder}; actors: --keys {args.folder})")
    print("copy to every other node  server.key actor.key actor.key_secret")
    print("and to the learner's also learner.key learner.key_secret")
    return 0

"""`sgpo-async keys`: key pairs for a hub that listens beyond loopback and for the processes that may join it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR."""
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="created if it does not exist; copy it to every node of the run"
    )


def run(args: argparse.Namespace) -> int:
    """Create the keys. Raises SgpoError."""
    from sgpo_async.transport.keys import create_keys

    create_keys(args.folder)
    print(f"keys: {args.folder}  (hub: hub.keys={args.folder}; actors: --keys {args.folder})")
    return 0

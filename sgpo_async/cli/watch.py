"""`sgpo-async watch`: the live display of a run, from any machine that reaches its hub. It changes nothing in the run.

    sgpo-async watch --hub tcp://10.0.0.1:5757 --keys keys/

It ends when the run ends. The hub's address is in its log and in hub.json in the run's folder.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--hub ADDRESS [--keys DIR]."""
    parser.add_argument("--hub", required=True, metavar="tcp://HOST:PORT", help="address of the hub")
    parser.add_argument("--keys", default="", metavar="DIR", help="folder of keys, if the hub uses keys")


def run(args: argparse.Namespace) -> int:
    """Show the run until it ends; returns 0, or 128 + the signal that ended the display. Raises SgpoError."""
    from sgpo_async.config.schema import host_of
    from sgpo_async.local.remote import watch_hub

    host_of("--hub", args.hub)
    return watch_hub(args.hub, keys=args.keys)

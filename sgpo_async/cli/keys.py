"""`sgpo-async keys`: key pairs for a hub that listens beyond loopback, for its learner and for its actors."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR, and what to do instead of making keys that all actors share."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="created if it does not exist")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--actor",
        nargs="+",
        default=[],
        metavar="NAME",
        help="make a key for each of these nodes (or who watches the run) instead of one for all; also during a run",
    )
    what.add_argument(
        "--revoke",
        default="",
        metavar="NAME",
        help="delete the key of this node ('actor': that of all others); a running hub then expels who has it",
    )
    what.add_argument("--list", action="store_true", help="show the names, files and digests of the actors' keys")


def run(args: argparse.Namespace) -> int:
    """Create, revoke or list keys. Raises SgpoError."""
    from sgpo_async.errors import HubError
    from sgpo_async.transport.keys import actor_keys, fingerprint, key_file, revoke

    if args.list:
        if not args.folder.is_dir():
            raise HubError(f"keys: {args.folder} is no folder; sgpo-async keys {args.folder} makes it, with keys")
        for key, name in actor_keys(args.folder).items():
            print(f"{name:20}  {fingerprint(key)}  {args.folder / key_file(name)}")
    elif args.revoke:
        print("keys: deleted", *revoke(args.folder, args.revoke))
    else:
        _create(args.folder, args.actor)
    return 0


def _create(folder: Path, actors: list[str]) -> None:
    from sgpo_async.transport.keys import add_actors, create_keys

    files = add_actors(folder, actors) if actors else create_keys(folder)
    print(f"keys: {folder}  (hub and learner: hub.keys={folder}; actors: --keys {folder})")
    if not actors:
        print("copy to every other node  server.key actor.key actor.key_secret")
    for path in [path for path in files if actors and path.name.startswith("actor") and path.suffix == ".key_secret"]:
        print(f"copy to one node  server.key {path.name}")
    print("and to the learner's also learner.key learner.key_secret")

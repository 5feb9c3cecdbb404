"""`sgpo-async dashboard`: a run in a browser, read-only. It changes nothing in the run (docs/dashboard.md).

sgpo-async dashboard runs/demo                                 # while the run goes on, or after its end
sgpo-async dashboard --hub tcp://10.0.0.1:5757 --keys keys/    # a run elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_async.errors import ConfigError, SgpoError

LISTEN = "127.0.0.1:8265"
TOKEN = "dashboard.token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[RUN] [--hub ADDRESS] [--keys DIR] [--listen HOST:PORT] [--token-file FILE]."""
    parser.add_argument("folder", metavar="RUN", type=Path, nargs="?", help="folder of the run, e.g. runs/demo")
    parser.add_argument(
        "--hub", default="", metavar="tcp://HOST:PORT", help="address of the hub; default: as hub.json in RUN says"
    )
    parser.add_argument("--keys", default="", metavar="DIR", help="folder of keys, if the hub uses keys")
    parser.add_argument("--listen", default=LISTEN, metavar="HOST:PORT", help="default: %(default)s; port 0: any")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"with the token that readers must know, made if missing; default beyond loopback: RUN/{TOKEN}",
    )
    parser.add_argument("--contact", type=Path, help=argparse.SUPPRESS)  # as a child of the hub: see `serve`


def run(args: argparse.Namespace) -> int:
    """Serve until a signal arrives. Raises SgpoError."""
    import asyncio

    from sgpo_async.config.rules import host_of, is_loopback, listen_address
    from sgpo_async.dashboard.access import token_from
    from sgpo_async.dashboard.observer import Observer
    from sgpo_async.dashboard.server import serve

    if args.hub:
        host_of("--hub", args.hub)
    elif args.folder is None:
        raise ConfigError("dashboard must get RUN or --hub, got neither; e.g. sgpo-async dashboard runs/demo")
    if args.folder is not None and not args.folder.is_dir():
        raise SgpoError(f"{args.folder}: there is no such folder; give the folder of a run, e.g. runs/demo")
    listen = listen_address("--listen", args.listen)
    file = args.token_file
    if file is None and not is_loopback(listen[0]):
        if args.folder is None:
            raise ConfigError(f"--token-file must name a file when --listen is beyond loopback, got {args.listen!r}")
        file = args.folder / TOKEN
    token = token_from(file) if file else ""
    observer = Observer(hub=args.hub, folder=args.folder, keys=args.keys)
    try:
        return asyncio.run(serve(observer, listen, token=token, contact=args.contact))
    finally:
        observer.close()

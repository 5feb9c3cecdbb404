"""`sgpo-async actor`: an inference node that joins a hub; start and stop it at any time, on any node.

Exit codes: 0 the run is over or the actor was stopped, 2 a permanent error, 3 an error that may pass (no hub for two
minutes, a server that died, a refusal of this one actor): what supervises the actor may start it again.
"""

from __future__ import annotations

import argparse
import sys

from sgpo_async import logs
from sgpo_async.errors import SgpoError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--hub ADDRESS and the settings of this node; every other setting comes from the hub."""
    parser.add_argument("--hub", required=True, metavar="tcp://HOST:PORT", help="address of the hub")
    parser.add_argument("--name", default="", help="unique among the run's members (default: chosen at random)")
    parser.add_argument(
        "--keys", default="", metavar="DIR", help="folder of keys, if the hub uses keys (see: sgpo-async keys)"
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="PATH",
        help="local copy of the model, if the run's model.path does not exist on this node",
    )
    parser.add_argument(
        "--slots", type=int, default=0, metavar="N", help="sequences decoded together (default: the run's)"
    )
    parser.add_argument(
        "--servers",
        type=int,
        default=0,
        metavar="N",
        help="SGLang servers that it launches (default: the run's)",
    )
    parser.add_argument(
        "--tp", type=int, default=0, metavar="N", help="tensor parallel ranks of each server (default: the run's)"
    )
    parser.add_argument("--device", default="", choices=["auto", "cpu", "cuda"], help="default: the run's")
    parser.add_argument(
        "--sglang-python", default="", metavar="PATH", help="Python of SGLang's environment on this node"
    )
    parser.add_argument(
        "--sglang-url", action="append", default=[], metavar="URL", help="attach to this server (may be repeated)"
    )
    parser.add_argument(
        "--own-store",
        action="store_true",
        help="keep a weight store of its own: otherwise actors on one machine, of one user, share one",
    )
    parser.add_argument(
        "--weights-by",
        choices=("rpc", "sockets", "folder"),
        default="rpc",
        help="sockets: over connections that only this node opens (NAT, firewall); folder: from the run's "
        "hub.weight_folder; default: Torch RPC, for which both nodes connect to each other",
    )
    parser.add_argument(
        "--logs", default="", metavar="DIR", help="folder for the servers' logs (default: a temporary folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until the run is over. Raises SgpoError."""
    from sgpo_async.actor.run import Actor, ActorOptions
    from sgpo_async.cli.resources import open_files
    from sgpo_async.config.schema import host_of, require
    from sgpo_async.local.supervisor import MAY_PASS

    host_of("--hub", args.hub)
    require(
        not (args.servers and args.sglang_url),
        "--servers",
        "must not be given with --sglang-url: a node launches servers or attaches to running ones",
        args.servers,
    )
    for name in ("slots", "servers", "tp"):
        require(getattr(args, name) >= 0, f"--{name}", "must be >= 0 (0: the run's)", getattr(args, name))
    open_files(actors=1)
    options = ActorOptions(
        hub=args.hub,
        **({"name": args.name} if args.name else {}),
        keys=args.keys,
        model=args.model,
        slots=args.slots,
        servers=args.servers,
        tp=args.tp,
        device=args.device,
        sglang_python=args.sglang_python,
        sglang_urls=tuple(args.sglang_url),
        own_store=args.own_store,
        road=args.weights_by,
        logs=args.logs,
    )
    logs.set_up("actor", name=options.name)
    try:
        return Actor(options).run()
    except SgpoError as error:
        if not error.may_pass:
            raise
        print(f"error: {error}", file=sys.stderr)
        return MAY_PASS

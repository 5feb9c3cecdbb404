"""`sgpo-async learner`: one rank of the learner, started by torchrun.

    torchrun --nproc-per-node 2 -m sgpo_async.cli learner CONFIG [key=value ...] [--hub tcp://HOST:PORT]

The hub decides the configuration of the run (`sgpo_async.config.agreement`): keys that this command leaves out are
taken from it, and a key with another value than the hub's is refused.

Without --hub, rank 0 starts the hub beside itself, listening at hub.address, and stops it at its own end. When torchrun
restarts the ranks, rank 0 starts a new hub, which takes the place of the earlier one: the actors connect to it again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.cli.options import add_config, config_arguments, load_run, print_dry_run, record_config
from sgpo_async.errors import ConfigError, HubError, Interrupted, SgpoError
from sgpo_async.installation import under_torchrun
from sgpo_async.logs import fields
from sgpo_async.processes.torchrun import forget_logs

if TYPE_CHECKING:
    from sgpo_async.config import Run

log = logging.getLogger(__name__)

SETTINGS_S = 120.0  # how long to wait for a hub
HUB_KILLED_S = 30.0  # after a kill of rank 0, in which the watchdog ends the hub beside it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--hub ADDRESS] [--dry-run]."""
    add_config(parser)
    parser.add_argument("--hub", default="", metavar="tcp://HOST:PORT", help="address of a hub that is already running")


def run(args: argparse.Namespace) -> int:
    """Train to the end. Raises SgpoError."""
    settings = load_run(args)
    arguments = config_arguments(args)
    if args.dry_run:
        hub = [] if args.hub else [["sgpo-async", "hub", *arguments]]
        learner = ["torchrun", *under_torchrun("learner"), *arguments, "--hub", _address(args, settings)]
        print_dry_run(settings, [*hub, learner])
        return 0
    if "RANK" not in os.environ:
        command = " ".join(["torchrun", *under_torchrun("learner"), args.config])
        raise ConfigError(f"learner: RANK is not set; start it by {command}")
    try:
        code = _run_rank(args, settings)
    except SgpoError as error:
        if str(error):
            _tell_torchrun(str(error))
        raise
    forget_logs()
    return code


def _run_rank(args: argparse.Namespace, settings: Run) -> int:
    from sgpo_async.cli.options import say_notes
    from sgpo_async.cli.preflight import preflight
    from sgpo_async.cli.resources import check_resume, check_start
    from sgpo_async.config.schema import CHECKPOINTS
    from sgpo_async.learner.resume import continues

    first = os.environ["RANK"] == "0"
    if args.hub or not first:
        settings = _as_hub_says(args, settings)
    if not first:
        return _train(settings, _address(args, settings))
    earlier = continues(settings.learner.resume, Path(settings.folder) / CHECKPOINTS)
    check_start(settings, checkpoints=True)
    check_resume(settings)
    say_notes(preflight(settings))
    record_config(settings, continues=earlier)
    if args.hub:
        return _train(settings, args.hub)
    with hub_beside(settings, config_arguments(args), continues=earlier) as address:
        return _train(settings, address)


def _as_hub_says(args: argparse.Namespace, settings: Run) -> Run:
    """The configuration with the keys that the hub decides. Raises ConfigError if it sets one of them differently."""
    from sgpo_async.config import agreed, given_keys
    from sgpo_async.transport import Dealer, Mailbox, request_settings

    max_bytes = settings.hub.max_message_mb * 2**20
    dealer = Dealer(_address(args, settings), keys=settings.hub.keys, role="learner", max_bytes=max_bytes)
    mailbox = Mailbox(dealer)
    try:
        # Without --hub, rank 0 starts the hub, after it has checked problems, prompts and rewards.
        patience_s = SETTINGS_S if args.hub else max(SETTINGS_S, settings.learner.batch_timeout_s)
        hubs = request_settings(mailbox, name=f"learner-{os.environ['RANK']}", timeout_s=patience_s)
        assert hubs is not None, "only actors are told to stop"
        return agreed(settings, given_keys(args.config, args.overrides), hubs)
    except SgpoError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise Interrupted("") from None  # the first rank of this node has the same command line, and says it
        raise
    finally:
        mailbox.close()


def _tell_torchrun(error: str) -> None:
    """Give torchrun the line of an error, which it prints as the root cause at the end of its own report."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"py_callstack": error, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": error, "extraInfo": details}}), encoding="utf-8")


def _address(args: argparse.Namespace, settings: Run) -> str:
    return args.hub or settings.hub.address


def _train(settings: Run, address: str) -> int:
    from sgpo_async.learner import train

    if os.environ["RANK"] != "0":
        return train(settings, address)
    from sgpo_async.report.close import close_run

    began = time.time()
    try:
        return train(settings, address)
    finally:
        close_run(Path(settings.folder), since=began)


@contextmanager
def hub_beside(settings: Run, arguments: list[str], *, continues: bool) -> Iterator[str]:
    """A hub that lives as long as this context, and is started again if it crashes; yields its address.

    If the run `continues` after a failure, the earlier hub, whose rank 0 has been killed, has HUB_KILLED_S to end.
    While torchrun can restart the ranks, a failure kills the hub: its actors take that for a lost connection, and wait
    for the next one.

    Raises RunFailed if it ends at once (for example because the port is taken), DeadlineExceeded if it does not start.
    """
    from sgpo_async.cli.local import LocalCommandLines
    from sgpo_async.local.children import Processes
    from sgpo_async.local.hub_process import kept_hub
    from sgpo_async.local.run_folder import claim

    folder = Path(settings.folder)
    deadline = time.monotonic() + (HUB_KILLED_S if continues else 0.0)
    while True:
        try:
            claim(folder, continues=continues)
            break
        except HubError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    processes = Processes(folder, comes_back=_restarts_left(os.environ) > 0)
    failed = True
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # torchrun ends ranks by SIGTERM: stop the hub, too

    try:
        with kept_hub(processes, LocalCommandLines(settings, arguments).hub) as address:
            about = fields(event="hub", address=address)
            log.info("the hub beside this learner is %s, its log %s/logs/hub.log", address, folder, extra=about)
            yield address
            failed = False
    except Interrupted:
        failed = False
        raise
    finally:
        processes.stop(failed=failed)


def _restarts_left(environment: Mapping[str, str]) -> int:
    """How often torchrun may still restart the ranks."""
    return int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    )

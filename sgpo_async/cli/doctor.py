"""`sgpo-async doctor`: checks whether a configuration can run here; prints a table, and a remedy for each failed check.

It launches the servers of the configuration, or attaches to its URLs. It changes their weights and generates with them,
so do not run it while an actor uses them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sgpo_async.cli.options import add_config, load_run, print_dry_run
from sgpo_async.processes.signals import Signals

if TYPE_CHECKING:
    from rich.table import Table

    from sgpo_async.config import Run
    from sgpo_async.engines.sglang.preflight import Finding, Subject

Sections = Mapping[str, Sequence["Finding"]]  # findings by the heading of their section

HERE = "this machine"
STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "not run": "dim"}
CONNECT_S = 5.0
FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--light] [--dry-run]."""
    add_config(parser)
    parser.add_argument(
        "--light", action="store_true", help="run only the checks that an actor runs when it joins (for large models)"
    )


def run(args: argparse.Namespace) -> int:
    """Examine and print; 0 if nothing failed. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "doctor", args.config, *args.overrides]])
        return 0
    from rich.console import Console

    from sgpo_async.cli.machine import examine_machine
    from sgpo_async.logs import printable

    console = Console(markup=False, emoji=False)
    with Signals() as signals:
        with console.status("looking at this machine ..."):
            here, facts = examine_machine(settings)
        sections: dict[str, Sequence[Finding]] = {HERE: here}
        if settings.engine.kind == "sglang" and facts is not None:
            with console.status("starting and examining servers ..."):
                sections |= examine_servers(settings, facts.folder, light=args.light, signals=signals)
        if signals.stop:
            return signals.exit_code
    console.print(render(sections))
    for line in closing(sections):
        console.print(printable(line), highlight=False)
    return FAILED if _of(sections, "failed") else 0


def examine_servers(settings: Run, folder: str, *, light: bool, signals: Signals) -> dict[str, Sequence[Finding]]:
    """Findings of every server, by heading. All launched servers have ended when it returns."""
    from sgpo_async.engines.sglang import SglangEngine
    from sgpo_async.engines.sglang.preflight import FULL, JOIN, Finding, Reference, examine
    from sgpo_async.errors import SgpoError
    from sgpo_async.weights import digest

    own = settings.engine.sglang
    silent = [url for url in own.urls if not _listens(url)]
    sections: dict[str, Sequence[Finding]] = {f"server {url}": [_silent(url)] for url in silent}
    attached = [url for url in own.urls if url not in silent]
    if own.urls and not attached:
        return sections
    dtype = settings.model.dtype
    reference = Reference(folder, dtype=dtype, digest=digest)
    engine_settings = replace(settings.engine, sglang=replace(own, urls=attached))

    async def examined(subject: Subject) -> Sequence[str]:
        subject = replace(subject, reference=reference, tokens=settings.rollout.max_new_tokens)
        sections[f"server {subject.server.api.url}"] = await examine(subject, JOIN if light else FULL)
        return []

    try:
        truncated = settings.rollout.is_truncated
        engine = SglangEngine(folder, engine_settings, dtype=dtype, digest=digest, truncated=truncated)
    except SgpoError as error:
        return sections | {"servers": [Finding("start", "failed", str(error), "correct the configuration")]}
    engine.examine = examined
    try:
        engine.start(lambda: signals.stop)
    except SgpoError as error:
        found, _, log_tail = str(error).partition("\n")
        remedy = f"correct what the end of its log names:\n{log_tail}" if log_tail else "correct the configuration"
        sections["servers"] = [Finding("start", "failed", found, remedy)]
    finally:
        engine.close()
    return sections


def render(sections: Sections) -> Table:
    """The table, a heading for each section."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sgpo_async.logs import printable

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("found", overflow="fold")
    for heading, findings in sections.items():
        table.add_section()
        kind, at, address = heading.partition("http://")
        table.add_row(Text(kind.rstrip(), style="bold"), "", Text(printable(at + address)))
        for finding in findings:
            outcome = Text(finding.outcome, style=STYLES[finding.outcome])
            table.add_row(f"  {finding.check}", outcome, Text(printable(finding.found)))
    return table


def closing(sections: Sections) -> Iterator[str]:
    """A remedy for each failure and each warning, and the number of failures."""
    several = len(sections) > 1
    for outcome in ("failed", "warning"):
        for heading, finding in _of(sections, outcome):
            where = f"{heading}: {finding.check}" if several else finding.check
            yield f"{outcome}: {where}: {finding.remedy}"
    failed = len(_of(sections, "failed"))
    yield f"{failed} failed" if failed else "nothing failed"


def _of(sections: Sections, outcome: str) -> list[tuple[str, Finding]]:
    return [(heading, one) for heading, findings in sections.items() for one in findings if one.outcome == outcome]


def _listens(url: str) -> bool:
    """Whether a process accepts connections at this URL: an attached server must be running already."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((parts.hostname, parts.port or 80), CONNECT_S):
        return True
    return False


def _silent(url: str) -> Finding:
    from sgpo_async.engines.sglang.preflight import Finding

    found = f"engine.sglang.urls: no server listens at {url}"
    return Finding("answers", "failed", found, "start the server there, or correct the URL")

"""One attack from start to end: schedule, run, audit, table, files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_async.chaos.audit import Audit
from sgpo_async.chaos.recording import HISTORY, replayed
from sgpo_async.chaos.run import ChaosRun
from sgpo_async.chaos.schedule import schedule
from sgpo_async.config import Run
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole
from sgpo_async.metrics import read_metrics, read_summary

LEARNED = 0.9  # the demo's bar: pass rate without strategies on held-out problems at its end
FAILED = 1  # exit code


def attack(run: Run, *, seed: int, faults: int, bar: float, to: Path) -> int:
    """Run under faults, audit, print a table, write chaos.txt and chaos.json into `to`; return the exit code.

    0: all steps are trained, the audit found nothing, and the pass rate reaches `bar`.
    Raises SgpoError if the run does not come to its end.
    """
    if (to / run.name).exists():
        raise SgpoError(f"chaos: {to / run.name} exists; choose another folder with --to DIR")
    chaos = ChaosRun(run, schedule(seed=seed, faults=faults, steps=run.steps), to)
    try:
        chaos.run_to_end()
    finally:
        report = {"seed": seed, "steps": run.steps, **chaos.plain()}
        write_whole(to / "chaos.json", json.dumps(report, indent=1) + "\n")
    lines, summary = read_metrics(run.folder), read_summary(run.folder)
    audit = audited(run, lines, summary)
    report |= {"audit": dict(sorted(audit.counts.items())), "violations": audit.violations}
    report |= {
        key: summary.get(key) for key in ("pass_auto_first", "pass_auto_last", "ledger", "rejected", "duplicates")
    }
    write_whole(to / "chaos.json", json.dumps(report, indent=1) + "\n")
    text = table(report, bar=bar)
    write_whole(to / "chaos.txt", text)
    print(text, end="")
    learned = (summary.get("pass_auto_last") or 0.0) >= bar
    return 0 if learned and not audit.violations else FAILED


def audited(run: Run, lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Audit:
    """The audit of a run that has ended, from its history. Raises HubError if that cannot be read."""
    audit = Audit(run)
    for observed in replayed(run, Path(run.folder) / HISTORY):
        audit.see(observed)
    audit.end(lines, summary)
    return audit


def table(report: Mapping[str, Any], *, bar: float) -> str:
    """Recovery times by kind, the counts of the audit, and the verdict, as text."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for fault in report["faults"]:
        by_kind.setdefault(fault["kind"], []).append(fault)
    lines = [
        f"seed {report['seed']}: {len(report['faults'])} faults in {report['steps']} steps, {report['wall_s']:.0f} s",
        "",
        f"{'fault':<20}{'times':>6}{'missed':>8}{'messages':>10}   s until the run is further: median, max",
    ]
    for kind, found in sorted(by_kind.items()):
        seconds = [one["recovered_s"] for one in found if one["recovered_s"] is not None and not one["missed"]]
        hits = [one["messages"] for one in found if one["messages"] is not None]
        missed = sum(one["missed"] for one in found)
        took = f"{statistics.median(seconds):8.1f}{max(seconds):8.1f}" if seconds else ""
        lines.append(f"{kind:<20}{len(found):6}{missed or '':>8}{sum(hits) if hits else '':>10}   {took}")
    starts = ", ".join(f"{name} {count}" for name, count in report["starts"].items())
    counts = ", ".join(f"{count} {name}" for name, count in report["audit"].items())
    passed = report["pass_auto_last"]
    rate = "none" if passed is None else f"{passed:.1%}"
    lines += ["", f"started: {starts}", f"audit: {counts}", *(f"VIOLATION: {one}" for one in report["violations"])]
    verdict = "ledger and journal disagree" if report["violations"] else "ledger and journal agree, event by event"
    return "\n".join([*lines, f"{verdict}; pass rate {rate}, bar {bar:.0%}", ""])

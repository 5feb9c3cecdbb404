"""What the reports of benchmarks have in common: median and interval, machine, versions, files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_async import __version__
from sgpo_async.errors import DeadlineExceeded, SgpoError
from sgpo_async.files import write_whole

VERSIONS_S = 60.0  # for another Python to say what it has


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "turns": list(values)}


def ratio(of: str, to: str, bar: float, values: tuple[Sequence[float], Sequence[float]]) -> dict[str, Any]:
    """The ratio of two settings, computed within each turn, and the `bar` that it should reach."""
    return {"of": of, "to": to, "bar": bar, **spread([a / b for a, b in zip(*values, strict=True)])}


def machine() -> str:
    """Day, cores and processor."""
    cores, day = len(os.sched_getaffinity(0)), time.strftime("%Y-%m-%d")
    return f"{day}, {cores} cores, {platform.machine()}, Linux {platform.release()}"


def load() -> float:
    """Mean number of runnable processes in the last minute."""
    return os.getloadavg()[0]


def versions(*distributions: str) -> dict[str, str]:
    """Versions of this package, of Python, and of these distributions."""
    own = {"sgpo-async": __version__, "Python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in distributions}


def versions_elsewhere(python: str, *distributions: str, given: str, remedy: str) -> dict[str, str]:
    """Versions of these distributions in the environment of another Python.

    Raises SgpoError if one is missing. `given` says how the user named that Python, and `remedy` what to do.
    """
    program = (
        "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    try:
        command = [python, "-c", program, *distributions]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=VERSIONS_S)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(given, "the versions of its packages", VERSIONS_S) from None
    except OSError as error:
        raise SgpoError(f"{given}: cannot be run ({error.strerror}); {remedy}") from error
    if found.returncode:
        raise SgpoError(f"{given}: it must have {', '.join(distributions)}; {remedy}")
    return dict(json.loads(found.stdout))


def header(report: Mapping[str, Any], what: str) -> list[str]:
    """The first lines of a table: machine, load and versions of the report, and what was measured."""
    before, after = report["load"]
    return [
        f"# {report['machine']}; load {before:.1f} before, {after:.1f} after",
        f"# {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"# {what}",
    ]


def interval(found: Mapping[str, Any], form: str = ".2f") -> str:
    """`median (low..high)`."""
    return f"{found['median']:{form}} ({found['low']:{form}}..{found['high']:{form}})"


def verdict(found: Mapping[str, Any], *, at_most: bool = False) -> str:
    """Whether the median reaches the bar."""
    met = found["median"] <= found["bar"] if at_most else found["median"] >= found["bar"]
    return "" if met else "missed"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned lines; the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_json(report: Any) -> str:
    """Indented JSON of a report: all floats with six significant digits, each list of numbers in one line."""
    text = json.dumps(_six_digits(report), indent=1)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n"


def _six_digits(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _six_digits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_six_digits(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def publish(part: str, to: Path, lines: Sequence[str], report: Mapping[str, Any]) -> None:
    """Print the table, and write it and the report as PART.txt and PART.json into the folder `to`."""
    print("\n".join(lines))
    write_whole(to / f"{part}.txt", "\n".join(lines) + "\n")
    write_whole(to / f"{part}.json", as_json(report))
    print(f"details in {to / f'{part}.json'}")

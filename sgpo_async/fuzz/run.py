"""Attack one target after the other, count how inputs are taken, and stop a target at its first finding."""

from __future__ import annotations

import importlib
import json
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sgpo_async import __version__
from sgpo_async.files import write_whole
from sgpo_async.fuzz.outcome import Record

# Modules of this package, and how many inputs they get if nothing else is said: a folder or a file takes longest.
INPUTS = {"codec": 1_000_000, "hub": 200_000, "checkpoint": 2_000, "configuration": 2_000}
WARM = 500  # inputs before memory is measured: caches and lazy imports
MOST_MB = 64.0  # growth of the largest memory after that


@dataclass
class Result:
    """What one target has done with its inputs."""

    target: str
    seed: int
    inputs: int = 0
    taken: dict[str, int] = field(default_factory=dict)  # inputs by how they were taken: accepted, or the error
    seconds: float = 0.0
    grown_mb: float = 0.0  # the largest memory after the first inputs, less that after these
    finding: str = ""

    @property
    def text(self) -> str:
        """One line of the table."""
        taken = ", ".join(f"{name} {count:,}" for name, count in Counter(self.taken).most_common(6))
        rest = len(self.taken) - 6
        return f"{self.target:<14}{self.inputs:>10,}{self.seconds:>8.0f} s{self.grown_mb:>8.1f} MB  {taken}" + (
            f" and {rest} more kinds" if rest > 0 else ""
        )


def run_fuzz(targets: Sequence[str], *, seed: int, inputs: int, to: Path) -> int:
    """Attack these targets, each with `inputs` inputs (0: its own number); print and write fuzz.txt and fuzz.json.

    Returns 0, or 1 if there is a finding.
    """
    results: list[Result] = []
    about = f"sgpo-async {__version__}, Python {platform.python_version()}, seed {seed}"
    lines = [about, f"{'target':<14}{'inputs':>10}{'time':>10}{'grown':>11}  how they were taken"]
    print("\n".join(lines), flush=True)
    for target in targets:
        result = attack(target, seed=seed, inputs=inputs or INPUTS[target])
        results.append(result)
        lines += [result.text, *([result.finding] if result.finding else [])]
        print("\n".join(lines[-1 - bool(result.finding) :]), flush=True)
        write_whole(to / "fuzz.txt", "\n".join([*lines, ""]))
        write_whole(to / "fuzz.json", json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return int(any(result.finding for result in results))


def attack(target: str, *, seed: int, inputs: int) -> Result:
    """Attack one target with inputs 0, 1, ... of this seed, until the last one or a finding."""
    result = Result(target, seed)
    attacks: Callable[[int, int, Record], None] = importlib.import_module(f"sgpo_async.fuzz.{target}").attacks
    began, warm, warm_mb = time.monotonic(), min(WARM, inputs // 2), 0.0

    def record(how: str) -> None:
        nonlocal warm_mb
        if result.inputs == warm:
            _forget_peak()
            warm_mb = _memory_mb("VmRSS")
        result.inputs += 1
        result.taken[how] = result.taken.get(how, 0) + 1

    try:
        attacks(seed, inputs, record)
    except Exception:  # any exception is what is looked for
        result.finding = f"input {result.inputs} of seed {seed}:\n{traceback.format_exc()}"
    result.seconds = time.monotonic() - began
    result.grown_mb = max(0.0, _memory_mb("VmHWM") - warm_mb) if warm_mb else 0.0
    if result.grown_mb > MOST_MB and not result.finding:
        result.finding = f"memory must grow by at most {MOST_MB:g} MB, got {result.grown_mb:.0f} MB"
    return result


def _forget_peak() -> None:
    """Have Linux measure the largest memory of this process (VmHWM) from now on, not since its start."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory_mb(key: str) -> float:
    """The memory of this process: VmRSS is what it has now, VmHWM the most that it has had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{key}:"))

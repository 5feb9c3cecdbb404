"""Does asynchrony pay on this machine, if each side has a core of its own? Real engine, real learner, real hub.

    sgpo-async bench pinned [--quick] [--to DIR]

The built-in demo with one actor on one core, and hub and learner on another, as if they were two machines. Each lag
trains the same problems; the lags take turns. Each row is the median over the repetitions, with the smallest and the
largest: trained problems per second between the fifth step and the last but one, and how long each side waited.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sgpo_async.bench.figures import as_json
from sgpo_async.config import Run, load, to_yaml
from sgpo_async.errors import DeadlineExceeded, SgpoError
from sgpo_async.files import write_whole
from sgpo_async.metrics import read_metrics
from sgpo_async.processes.torchrun import torchrun

LAGS, QUICK_LAGS = (0, 1, 2, 4), (0, 2)
STEPS, QUICK_STEPS = 60, 25
REPETITIONS, QUICK_REPETITIONS = 5, 1
SKIPPED = 5  # steps at the start that are not measured
START_S, RUN_S = 180.0, 900.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run."""

    problems_per_s: float
    learner_idle: float
    engine_idle: float
    lag: float


def run_bench_pinned(*, quick: bool, to: Path) -> int:
    """Measure every lag in turns; print a table, write pinned.txt and pinned.json into `to`.

    Raises SgpoError if the machine has one core only, or with the end of the log of a process that failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SgpoError("bench pinned: needs two cores, one for each side, and may use one")
    found: dict[int, list[Measured]] = {lag: [] for lag in (QUICK_LAGS if quick else LAGS)}
    for number in range(QUICK_REPETITIONS if quick else REPETITIONS):
        for lag, runs in found.items():
            print(f"repetition {number + 1}, lag {lag} ...", file=sys.stderr, flush=True)
            runs.append(measure(lag, steps=QUICK_STEPS if quick else STEPS, cores=(cores[0], cores[1])))
    text = _table(found)
    print(text, end="")
    write_whole(to / "pinned.txt", text)
    plain = {str(lag): [vars(one) for one in runs] for lag, runs in found.items()}
    write_whole(to / "pinned.json", as_json(plain))
    return 0


def measure(lag: int, *, steps: int, cores: tuple[int, int]) -> Measured:
    """One run: hub and learner on the first core, the actor on the second."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"steps={steps}", f"evaluation.every={steps}", "tasks.held_out=8", "local.ranks=1", "local.actors=1"]
        where = [f"out={folder}", "name=run", "hub.address=tcp://127.0.0.1:0", "learner.trackers=[]"]
        run = load("builtin:demo", [*sizes, *where, f"hub.max_lag={lag}"])
        config = Path(folder) / "run.yaml"
        write_whole(config, to_yaml(run))
        with _processes(Path(folder)) as start:
            command = [sys.executable, "-m", "sgpo_async.cli"]
            start([*command, "hub", str(config)], cores[0])
            address = _address(run)
            learner = start([*torchrun(1), "-m", "sgpo_async.cli", "learner", str(config), "--hub", address], cores[0])
            start([*command, "actor", "--hub", address], cores[1])
            _wait(learner, Path(folder))
        return _measured(read_metrics(run.folder), run)


def _measured(lines: Sequence[dict[str, Any]], run: Run) -> Measured:
    first, last = lines[SKIPPED - 1], lines[-2]  # the last one waits for the final evaluation
    wall = last["wall_s"] - first["wall_s"]
    return Measured(
        problems_per_s=run.learner.problems_per_step * (last["step"] - first["step"]) / wall,
        learner_idle=statistics.fmean(line["learner_idle"] for line in lines[SKIPPED:-1]),
        engine_idle=last["engine_idle"],
        lag=statistics.fmean(line["lag_mean"] for line in lines[SKIPPED:-1]),
    )


@contextlib.contextmanager
def _processes(folder: Path) -> Iterator[Any]:
    """Yields a function that starts a process on a core; all are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], core: int) -> subprocess.Popen[bytes]:
        with (folder / f"log-{len(started)}").open("wb") as log:
            started.append(
                subprocess.Popen(
                    ["taskset", "--cpu-list", str(core), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.wait()


def _address(run: Run) -> str:
    """The hub's address, from the file that it writes when it listens."""
    contact, deadline = Path(run.folder) / "hub.json", time.monotonic() + START_S
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: it is being written
            return str(json.loads(contact.read_text(encoding="utf-8"))["address"])
        if time.monotonic() > deadline:
            raise DeadlineExceeded("bench pinned", "start of the hub", START_S)
        time.sleep(0.05)


def _wait(learner: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        code = learner.wait(RUN_S)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded("bench pinned", "end of the learner", RUN_S) from None
    if code:
        tails = [log.read_text(errors="replace")[-1000:] for log in sorted(folder.glob("log-*"))]
        raise SgpoError("bench pinned: the learner ended with code " + "\n".join([str(code), *tails]))


def _table(found: dict[int, list[Measured]]) -> str:
    """The rows as text; ratios are to lag 0 of the same repetition."""
    about = f"Python {platform.python_version()}, torch {torch.__version__}, load {psutil.getloadavg()[0]:.1f}"
    lines = [
        f"builtin:demo, one actor and one rank, a core for each side; {about}",
        f"{'lag':>4}{'problems/s':>12}{'':>16}{'x lag 0':>9}{'':>13}{'trainer waits':>15}{'engine waits':>14}"
        f"{'mean lag':>10}",
    ]
    for lag, runs in found.items():
        rates = sorted(one.problems_per_s for one in runs)
        ratios = sorted(one.problems_per_s / base.problems_per_s for one, base in zip(runs, found[0], strict=True))
        lines.append(
            f"{lag:4}{statistics.median(rates):12.1f}{f'{rates[0]:.1f}..{rates[-1]:.1f}':>16}"
            f"{statistics.median(ratios):9.2f}{f'{ratios[0]:.2f}..{ratios[-1]:.2f}':>13}"
            f"{statistics.median(one.learner_idle for one in runs):15.0%}"
            f"{statistics.median(one.engine_idle for one in runs):14.0%}"
            f"{statistics.median(one.lag for one in runs):10.2f}"
        )
    return "\n".join([*lines, ""])

"""Measures the settings one after another and reports them side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sgpo_async.bench.figures import as_json
from sgpo_async.config import Run, to_plain, to_yaml
from sgpo_async.errors import DeadlineExceeded, SgpoError
from sgpo_async.files import write_whole
from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.processes.torchrun import torchrun

START_S = 300.0  # for processes to import torch and load the model, on a busy machine


def run_bench(run: Run, *, seconds: float = 20.0) -> int:
    """Measure every setting for about `seconds` each; print a table, write <run.folder>/bench.json.

    Raises SgpoError with the last lines of a process that failed, DeadlineExceeded for one that hangs.
    """
    folder = Path(run.folder)
    config = folder / "bench.yaml"
    write_whole(config, to_yaml(run))
    results: dict[str, dict[str, Any]] = {}
    settings = _WITH_SERVERS if run.engine.kind == "sglang" else _EMBEDDED
    for setting, measure in settings.items():
        print(f"measuring {setting} ...", file=sys.stderr, flush=True)
        results[setting] = measure(run, config, seconds)
    conclusions = _conclusions(results)
    report = {"config": to_plain(run), "seconds": seconds, "settings": results, **conclusions}
    write_whole(folder / "bench.json", as_json(report))
    _print(results)
    for name, figure in conclusions.items():
        print(f"{name.replace('_', ' ')}: {figure:.2f}")
    print(f"details in {folder / 'bench.json'}")
    return 0


def _conclusions(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios between settings."""
    if "servers" in results:
        return {name: results["servers"][name] for name in ("actor_over_bare", "pause_s_median", "pause_s_max")}
    rates = [results[setting]["problems_per_s"] for setting in ("asynchronous", "synchronous")]
    return {"asynchronous_over_synchronous": rates[0] / rates[1]}


def _generation(run: Run, config: Path, seconds: float) -> dict[str, Any]:
    words = [[sys.executable, "-m", "sgpo_async.bench.worker_generation", str(config), str(i), str(seconds)]
             for i in range(run.local.actors)]  # fmt: skip
    parts = _outputs(words, seconds)
    return _rates(
        tokens=sum(part["tokens"] / part["seconds"] for part in parts),
        problems=sum(part["problems"] / part["seconds"] for part in parts),
    )


def _ranks(setting: str, run: Run, config: Path, seconds: float) -> dict[str, Any]:
    worker = ["-m", "sgpo_async.bench.worker_learner", str(config), setting, str(seconds), "steps=1000000"]
    (part,) = _outputs([[*torchrun(run.local.ranks), *worker]], seconds)
    rates = _rates(tokens=part["tokens"] / part["seconds"], problems=part["problems"] / part["seconds"])
    generating = part["generating"] if setting == "synchronous" else 0.0
    return rates | {"learner_idle": generating, "engine_idle": 1 - generating}


def _asynchronous(run: Run, config: Path, seconds: float) -> dict[str, Any]:
    """The whole system, measured from the end of the first step to the end of the last but one: without the start."""
    name = f"{run.name}-bench"
    overrides = [f"name={name}", f"evaluation.every={run.steps}"]
    _outputs([[sys.executable, "-m", "sgpo_async.cli", "local", str(config), *overrides]], 60 * seconds, reads=False)
    folder = Path(run.out) / name
    lines = read_metrics(folder)
    if len(lines) < 3:
        raise SgpoError(f"bench: steps={run.steps} are too few to measure; raise it to 10 or more")
    first, last = lines[0], lines[-2]  # the last line waits for the final evaluation
    wall = last["wall_s"] - first["wall_s"]
    rates = _rates(
        tokens=(last["tokens_trained"] - first["tokens_trained"]) / wall,
        problems=run.learner.problems_per_step * (last["step"] - first["step"]) / wall,
    )
    idle = sum(line["learner_idle"] for line in lines[1:-1]) / len(lines[1:-1])
    summary = read_summary(folder)
    return rates | {"learner_idle": idle, "engine_idle": last["engine_idle"], "lag_mean": summary["lag_mean"]}


def _servers(_run: Run, config: Path, seconds: float) -> dict[str, Any]:
    """The same servers under plain requests and under the actor, and the pause of an update (see `worker_servers`)."""
    (part,) = _outputs(
        [[sys.executable, "-m", "sgpo_async.bench.worker_servers", str(config), str(seconds)]], 10 * seconds
    )
    return part | {"tokens_per_s": part["actor_tokens_per_s"]}


_EMBEDDED: dict[str, Callable[[Run, Path, float], dict[str, Any]]] = {
    "generation": _generation,
    "learner": lambda run, config, seconds: _ranks("learner", run, config, seconds),
    "synchronous": lambda run, config, seconds: _ranks("synchronous", run, config, seconds),
    "asynchronous": _asynchronous,
}
_WITH_SERVERS: dict[str, Callable[[Run, Path, float], dict[str, Any]]] = {
    "servers": _servers,
    "asynchronous": _asynchronous,
}


def _rates(*, tokens: float, problems: float) -> dict[str, Any]:
    return {"tokens_per_s": tokens, "problems_per_s": problems}


def _outputs(commands: Sequence[Sequence[str]], seconds: float, *, reads: bool = True) -> list[dict[str, Any]]:
    """Run these processes side by side and return the last line of each, parsed as JSON."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # one thread per process, as everywhere in this system
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for c in commands
    ]
    deadline = time.monotonic() + START_S + 3 * seconds
    parts = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded("bench", f"end of {' '.join(process.args)}", START_S + 3 * seconds) from None  # type: ignore[arg-type]
            if process.returncode:
                raise SgpoError(f"bench: a process ended with code {process.returncode}:\n{(err or out)[-2000:]}")
            parts.append(json.loads(out.strip().splitlines()[-1]) if reads else {})
    finally:
        for process in processes:
            process.kill()
    return parts


def _print(results: dict[str, dict[str, Any]]) -> None:
    table = Table("setting", "tokens/s", "problems/s", "trainer idle", "engine idle")
    for setting, figures in results.items():
        idle = [f"{100 * figures[key]:.0f} %" if key in figures else "" for key in ("learner_idle", "engine_idle")]
        problems = f"{figures['problems_per_s']:.1f}" if "problems_per_s" in figures else ""
        table.add_row(setting, f"{figures['tokens_per_s']:,.0f}", problems, *idle)
    Console(markup=False, emoji=False).print(table)

"""Runs and evaluations from Python, for notebooks and programs: `from sgpo_async import evaluate, load_config, train`.

They do what `sgpo-async local` and `sgpo-async evaluate` do, with the same processes and files. Every error is an
exception of `sgpo_async.errors`, whose message is one line. Importing this module does not import torch.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sgpo_async.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from sgpo_async.config import Run
    from sgpo_async.local.follow import Progress


@dataclass(frozen=True)
class TrainResult:
    """What a run has left in its folder."""

    folder: Path  # runs/NAME
    summary: dict[str, Any]  # summary.json
    metrics: list[dict[str, Any]]  # metrics.jsonl: a row for each step

    @property
    def policy(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.folder / "policy"


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has left in its folder."""

    folder: Path
    summary: dict[str, Any]  # summary.json: for each benchmark avg@k and pass@k with their intervals
    problems: dict[str, list[dict[str, Any]]]  # by benchmark: a row for each problem


def load_config(path: str | Path = "", *overrides: str) -> Run:
    """Read a configuration, a YAML file or builtin:NAME, and overrides: key=value, or further files.

    An empty path means the defaults. Raises ConfigError.
    """
    from sgpo_async.config import load

    return load(path, overrides)


def train(
    run: Run | str | Path, *overrides: str, progress: Literal["display"] | Progress | None = "display"
) -> TrainResult:
    """Run on this machine to the end, as `sgpo-async local` does; an interrupt first writes a checkpoint.

    Args:
        run: a configuration, or what `load_config` reads.
        overrides: as for `load_config`.
        progress: display: as the command shows it; a function: called with the metrics of every step; None: silent.

    Raises:
        ConfigError: the configuration is wrong, or this is not the main thread, which alone gets Ctrl-C.
        CheckFailed, DataError, HubError: the run cannot start.
        RunFailed, DeadlineExceeded: it cannot go on.
        Interrupted: a signal ended it; with learner.resume=true it goes on from its checkpoint.
    """
    from sgpo_async.cli.local import LocalCommandLines, hub_address, prepare, run_shown
    from sgpo_async.local.follow import Follow
    from sgpo_async.local.show import Show
    from sgpo_async.local.supervisor import supervise
    from sgpo_async.metrics import read_metrics, read_summary

    settings = _settings(run, overrides)
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("train must be called in the main thread, which alone gets signals such as Ctrl-C")
    prepare(settings)
    folder = Path(settings.folder)
    # The processes read the configuration from the run's folder, where the caller's files and changes to them are in.
    plan = LocalCommandLines(settings, [str(folder.resolve() / "config.yaml"), f"hub.address={hub_address(settings)}"])
    again = "learner.resume=true"
    if progress == "display":
        code = run_shown(plan, Show(settings, again=f"the same call with {shlex.quote(again)}"))
    else:
        code = supervise(plan, folder, Follow(settings, progress or _ignore))
    if code:
        raise Interrupted(f"{folder}: the run was interrupted; to go on from its checkpoint, add {again!r}", code)
    return TrainResult(folder, read_summary(folder), read_metrics(folder))


def evaluate(  # noqa: PLR0913 (all but the first two have the names and defaults of the command's options)
    run: Run | str | Path,
    *overrides: str,
    model: str | Path = "",
    benchmarks: Mapping[str, str | Path] | Sequence[str] = (),
    samples: int | Mapping[str, int] = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    guided: bool = False,
    texts: bool = False,
    out: str | Path = "",
) -> EvaluationResult:
    """Measure avg@k and pass@k of a model, as `sgpo-async evaluate` does; a call that was interrupted is continued.

    Args:
        run: a configuration, or what `load_config` reads: how prompts are built, and the engine.
        overrides: as for `load_config`.
        model: a Hugging Face folder, e.g. `train(...).policy`; default: model.path of the configuration.
        benchmarks: files by name, or names of evaluation.benchmarks; default: the configuration's held-out problems.
        samples: completions of each problem, the k of avg@k; of all benchmarks or by name.
        guided: with the strategies before the problems.
        texts: keep the completions.
        out: folder of the results; default: out/name/evaluation of the configuration.

    Raises ConfigError, DataError, EngineError or DeadlineExceeded.
    """
    from sgpo_async.cli.evaluate import evaluate_shown, parse_samples, plan_of
    from sgpo_async.evaluation.results import Results

    settings = _settings(run, overrides)
    if model:
        settings = replace(settings, model=replace(settings.model, path=str(model)))
    words = [f"{name}={path}" for name, path in benchmarks.items()] if isinstance(benchmarks, Mapping) else benchmarks
    counts = [f"{name}={k}" for name, k in samples.items()] if isinstance(samples, Mapping) else [str(samples)]
    plan = plan_of(settings, words, samples=parse_samples(counts), temperature=temperature, top_p=top_p, guided=guided)
    folder = Path(out or f"{settings.folder}/evaluation")
    summary = evaluate_shown(plan, folder, texts=texts)
    results = Results(folder)
    problems = {one.name: [vars(row) for row in results.problems(one.name)] for one in plan.benchmarks}
    return EvaluationResult(folder, summary, problems)


def _settings(run: Run | str | Path, overrides: Sequence[str]) -> Run:
    from sgpo_async.config import load, overridden

    return load(run, overrides) if isinstance(run, str | Path) else overridden(run, overrides)


def _ignore(_metrics: Mapping[str, Any]) -> None:
    """Show nothing."""

"""One evaluation, from its plan to its summary. Problems that an earlier call has finished are not sampled again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sgpo_async import __version__
from sgpo_async.config import Run
from sgpo_async.engines.base import Engine, Weights
from sgpo_async.engines.open import open_engine
from sgpo_async.evaluation.evaluation_plan import EvaluationPlan
from sgpo_async.evaluation.results import Results
from sgpo_async.evaluation.sampling import Evaluator, Item
from sgpo_async.metrics.problems import summarise
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.weights import digest

LIBRARIES = ("torch", "transformers", "math-verify")

Progress = Callable[[int, int], None]
"""Called with (problems done, problems in all)."""


def evaluate(
    plan: EvaluationPlan, out: Path, *, texts: bool, progress: Progress, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Sample and judge the problems that `out` has no result of; write and return the summary.

    Raises ConfigError if `out` holds another evaluation, DataError, EngineError, DeadlineExceeded, SgpoError.
    """
    folder = model_folder(plan.run.model.path)
    tokenizer = load_tokenizer(folder)
    weights = _weights(plan.run, folder)
    settings = plan.settings(weights.digest)
    results = Results(out)
    with results.writing(settings):
        missing = _missing(plan, results)
        total = sum(len(benchmark.problems) for benchmark in plan.benchmarks)
        progress(total - len(missing), total)
        if missing:
            engine = _open(plan.run, folder)
            try:
                engine.load(weights)
                evaluator = Evaluator(plan, engine, tokenizer, report=tell)
                try:
                    for done, (name, result) in enumerate(evaluator.results(missing, texts=texts), start=1):
                        results.add(name, result)
                        progress(total - len(missing) + done, total)
                finally:
                    evaluator.close()
            finally:
                engine.close()
        summary = _summary(plan, settings, results)
        results.finish(summary)
    return summary


def _missing(plan: EvaluationPlan, results: Results) -> list[Item]:
    done = {benchmark.name: {one.id for one in results.problems(benchmark.name)} for benchmark in plan.benchmarks}
    return [
        (benchmark, problem)
        for benchmark in plan.benchmarks
        for problem in benchmark.problems
        if problem.id not in done[benchmark.name]
    ]


def _weights(run: Run, folder: str) -> Weights:
    """The weights of the model as version 0: engines serve verified versions only."""
    tensors = dict(load_model(folder, device="cpu", dtype=run.model.dtype).named_parameters())
    return Weights(version=0, digest=digest(tensors.items()), read=lambda: tensors)


def _open(run: Run, folder: str) -> Engine:
    """Open the engine. There is no learner to broadcast weights, so servers get them in the default way."""
    if run.engine.broadcasts:
        run = replace(run, engine=replace(run.engine, sglang=replace(run.engine.sglang, transport="auto")))
    return open_engine(run, folder)


def _summary(plan: EvaluationPlan, settings: Mapping[str, Any], results: Results) -> dict[str, Any]:
    sampling = ("temperature", "top_p", "max_new_tokens", "prompt", "guided", "seed")
    return {
        "model": {"path": plan.run.model.path, "digest": settings["model"], "dtype": settings["dtype"]},
        "engine": settings["engine"],
        "sampling": {key: settings[key] for key in sampling},
        "benchmarks": {one.name: summarise(results.problems(one.name)) for one in plan.benchmarks},
        "versions": {"sgpo-async": __version__} | {name: version(name) for name in LIBRARIES},
    }

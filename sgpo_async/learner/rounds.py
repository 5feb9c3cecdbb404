"""Every round of benchmarks on disk, problem by problem, in the files of `sgpo-async evaluate`.

runs/NAME/benchmarks/VERSION/    settings.json, a line for each problem in BENCHMARK.jsonl, summary.json

So two rounds of a run, or rounds of two runs, are compared as two evaluations are: `sgpo-async evaluate --compare A B`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sgpo_async.config.schema import Run
from sgpo_async.files import to_json, write_whole
from sgpo_async.wire.records import BenchmarkScore, Evaluated

FOLDER = "benchmarks"


def forget_rounds(run: Run, *, above: int = -1) -> None:
    """Remove the rounds of versions above `above`: they are of a life that was given up.

    Versions jump past those of such a life, so nothing would ever take their place.
    """
    for folder in (Path(run.folder) / FOLDER).glob("*"):
        if folder.name.isdecimal() and int(folder.name) > above:
            shutil.rmtree(folder, ignore_errors=True)


def write_round(run: Run, result: Evaluated) -> None:
    """Write the benchmarks of which a problem could be served; none, no folder. Raises SgpoError."""
    scores = [score for score in result.benchmarks if score.results]
    if not scores:
        return
    folder = Path(run.folder) / FOLDER / str(result.version)
    write_whole(folder / "settings.json", _json(_settings(run, result, scores)))
    for score in scores:
        lines = [to_json(score.results[id]) + "\n" for id in sorted(score.results)]
        write_whole(folder / f"{score.name}.jsonl", "".join(lines))
    write_whole(folder / "summary.json", _json({"benchmarks": {score.name: _figures(score) for score in scores}}))


def _settings(run: Run, result: Evaluated, scores: list[BenchmarkScore]) -> dict[str, Any]:
    """All that the results depend on, by the names of `sgpo-async evaluate`; versions take the place of a digest."""
    return {
        "model": f"{run.folder}, versions {result.served_oldest} to {result.served_newest}",
        "dtype": run.model.dtype,
        "engine": run.engine.kind,
        "temperature": run.evaluation.temperature,
        "top_p": run.evaluation.top_p,
        "max_new_tokens": run.rollout.max_new_tokens,
        "prompt": run.tasks.prompt,
        "guided": False,
        "seed": run.seed,
        "benchmarks": {score.name: {"problems": score.problems, "samples": score.samples} for score in scores},
    }


def _figures(score: BenchmarkScore) -> dict[str, Any]:
    avg = {"mean": score.avg, "low": score.low, "high": score.high}
    return {"problems": score.problems, "samples": score.samples, "avg": avg, "pass": score.pass_at}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"

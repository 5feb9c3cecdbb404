"""Write every evaluation round on benchmarks to disk, in the file format of `sgpo-async evaluate`.

runs/NAME/benchmarks/VERSION/    settings.json, BENCHMARK.jsonl with one line per problem, summary.json

Therefore `sgpo-async evaluate --compare A B` can compare two rounds of a run, or rounds of two runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sgpo_async.config.schema import Run
from sgpo_async.files import to_json, write_whole
from sgpo_async.tasks.prompts import prompt_settings
from sgpo_async.wire.records import BenchmarkScore, Evaluated

FOLDER = "benchmarks"


def remove_rounds(run: Run, *, above: int = -1) -> None:
    """Delete the rounds of versions above `above`, which an earlier attempt of the run left.

    The run never reuses these version numbers, so it would never overwrite these rounds.
    """
    for folder in (Path(run.folder) / FOLDER).glob("*"):
        if folder.name.isdecimal() and int(folder.name) > above:
            shutil.rmtree(folder, ignore_errors=True)


def write_round(run: Run, result: Evaluated) -> None:
    """Write the benchmarks that have results; without any, create no folder. Raises SgpoError."""
    scores = [score for score in result.benchmarks if score.results]
    if not scores:
        return
    folder = Path(run.folder) / FOLDER / str(result.version)
    write_whole(folder / "settings.json", _json(_settings(run, result, scores)))
    for score in scores:
        lines = [to_json(score.results[id]) + "\n" for id in sorted(score.results)]
        write_whole(folder / f"{score.name}.jsonl", "".join(lines))
    write_whole(folder / "summary.json", _json({"benchmarks": {score.name: _scores(score) for score in scores}}))


def _settings(run: Run, result: Evaluated, scores: list[BenchmarkScore]) -> dict[str, Any]:
    """Return all settings that affect the results, named as in `sgpo-async evaluate`; versions replace the digest."""
    return {
        "model": f"{run.folder}, versions {result.served_oldest} to {result.served_newest}",
        "dtype": run.model.dtype,
        "engine": run.engine.kind,
        "temperature": run.evaluation.temperature,
        "top_p": run.evaluation.top_p,
        "max_new_tokens": run.rollout.max_new_tokens,
        **prompt_settings(run.tasks),
        "guided": False,
        "seed": run.seed,
        "benchmarks": {score.name: {"problems": score.problems, "samples": score.samples} for score in scores},
    }


def _scores(score: BenchmarkScore) -> dict[str, Any]:
    avg = {"mean": score.avg, "low": score.low, "high": score.high}
    return {"problems": score.problems, "samples": score.samples, "avg": avg, "pass": score.pass_at}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"

"""What each teacher costs: `python docs/results/teachers.py` runs the synchronous demo with each and prints a table.

The runs are short, of one seed, and say nothing of what is learned. One after another on a machine that is otherwise
idle; the first steps, in which everything is allocated, do not count. Writes teachers.json beside this file.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from sgpo_async.experiments.code_version import code_version
from sgpo_async.metrics import read_metrics, read_summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, FIRST = 40, 8
TEACHERS = {
    "self": ["algorithm.teacher=self"],
    "ema": ["algorithm.teacher=ema"],
    "snapshot": ["algorithm.teacher=snapshot"],
    "frozen": ["algorithm.teacher=frozen"],
    "frozen-bfloat16": ["algorithm.teacher=frozen", "algorithm.teacher_dtype=bfloat16"],
    "behaviour": ["algorithm.teacher=behaviour"],
    "none": ["algorithm.objective=grpo", "rollout.autonomous=12", "rollout.guided=0"],
}
COLUMNS = ("teacher", "its copy, MB", "tokens trained", "tokens forward only", "update, ms", "waiting for rollouts, ms")


def measure(teacher: str) -> list[float]:
    """The columns: of counts the mean over a run's steps, of times the median."""
    name = f"teacher-{teacher}"
    words = [f"name={name}", f"steps={STEPS}", f"evaluation.every={STEPS}", *TEACHERS[teacher]]
    subprocess.run(
        [sys.executable, "launch/local.py", "configs/demo-sync.yaml", *words], cwd=ROOT, check=True, timeout=900
    )
    lines = read_metrics(ROOT / "runs" / name)[FIRST:]
    laps = [(1000 * (line["wall_s"] - before["wall_s"]), line["learner_idle"]) for before, line in pairwise(lines)]
    return [
        read_summary(ROOT / "runs" / name)["teacher_mb"],
        fmean(line["tokens"] for line in lines),
        fmean(line["tokens_forward_only"] for line in lines),
        median(lap * (1 - idle) for lap, idle in laps),
        median(lap * idle for lap, idle in laps),
    ]


if __name__ == "__main__":
    figures = {teacher: measure(teacher) for teacher in TEACHERS}
    named = {teacher: dict(zip(COLUMNS[1:], row, strict=True)) for teacher, row in figures.items()}
    (HERE / "teachers.json").write_text(json.dumps({"code": code_version(), "teachers": named}, indent=1) + "\n")
    rows = [[teacher, f"{row[0]:.1f}", *(f"{value:,.0f}" for value in row[1:])] for teacher, row in figures.items()]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]))

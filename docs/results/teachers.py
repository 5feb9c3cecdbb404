"""What each teacher costs: `python docs/results/teachers.py` runs the synchronous demo with each and prints a table.

The runs are short, of one seed, and say nothing of what is learned; what is counted does not depend on the machine.
Writes teachers.json beside this file.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from sgpo_async.experiments.code_version import code_version
from sgpo_async.metrics import read_metrics, read_summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 24
TEACHERS = {
    "self": ["algorithm.teacher=self"],
    "ema": ["algorithm.teacher=ema"],
    "snapshot": ["algorithm.teacher=snapshot"],
    "frozen": ["algorithm.teacher=frozen"],
    "frozen-bfloat16": ["algorithm.teacher=frozen", "algorithm.teacher_dtype=bfloat16"],
    "behaviour": ["algorithm.teacher=behaviour"],
    "none": ["algorithm.objective=grpo", "rollout.autonomous=12", "rollout.guided=0"],
}
ALL = ("algorithm.teacher_temperature=1", "algorithm.distil_skip=0")  # which every teacher takes
COLUMNS = ("teacher", "its copy, MB", "tokens trained in a step", "tokens in a forward alone", "share")


def measure(teacher: str) -> tuple[float, float, float]:
    """The copy in MB over all ranks; tokens of a step, in the mean: with gradient, and in a forward alone."""
    name = f"teacher-{teacher}"
    words = [f"name={name}", f"steps={STEPS}", f"evaluation.every={STEPS}", *ALL, *TEACHERS[teacher]]
    subprocess.run(
        [sys.executable, "launch/local.py", "configs/demo-sync.yaml", *words], cwd=ROOT, check=True, timeout=900
    )
    lines = read_metrics(ROOT / "runs" / name)
    counts = (fmean(line[key] for line in lines) for key in ("tokens", "tokens_forward_only"))
    return read_summary(ROOT / "runs" / name)["teacher_mb"], *counts


if __name__ == "__main__":
    figures = {teacher: measure(teacher) for teacher in TEACHERS}
    named = {teacher: dict(zip(COLUMNS[1:], row, strict=False)) for teacher, row in figures.items()}
    (HERE / "teachers.json").write_text(json.dumps({"code": code_version(), "teachers": named}, indent=1) + "\n")
    rows = [
        (teacher, f"{copy:.2f}", f"{trained:,.0f}", f"{alone:,.0f}", f"{alone / trained:.0%}")
        for teacher, (copy, trained, alone) in figures.items()
    ]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]))

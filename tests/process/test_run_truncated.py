"""A run that samples with top-p and top-k: importance ratios are those of the truncated distribution."""

from pathlib import Path

import pytest
from run_support import real_run

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.mark.parametrize("teacher", ["frozen", "behaviour"])
def test_a_truncated_run_is_trained_and_resumed(tmp_path: Path, teacher: str) -> None:
    """At lag 0 learner and engine agree to rounding errors, so every ratio is 1. Evaluation is not truncated."""
    truncated = [
        "rollout.top_p=0.9",
        "rollout.top_k=4",
        f"algorithm.teacher={teacher}",
        "algorithm.teacher_temperature=1",
    ]
    with real_run(tmp_path, "steps=2", "hub.max_lag=0", *truncated) as run:
        first = run.local()
        assert first.wait() == 0, first.output
        lines = run.resume(steps=4)
        assert all(line["mismatch_max_lag0_first"] < 1e-4 and line["grad_norm"] > 0 for line in lines)
        assert all(line["ratio_mean"] == pytest.approx(1, abs=1e-4) for line in lines)
        assert all(1 < line["kept_mean"] < 4 for line in lines)
        run.assert_cleaned_up()

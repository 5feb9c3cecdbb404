"""Objectives and teachers in complete runs: LUFFY, an EMA teacher, the behaviour policy as teacher, other methods."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_support import real_run

from sgpo_async.config import builtin_names

pytestmark = pytest.mark.process

SMALL = ("steps=2", "local.actors=1", "rollout.max_new_tokens=40")


@pytest.mark.slow
def test_luffy_learns_from_the_problems_own_responses(tmp_path: Path) -> None:
    """The base policy solves almost nothing alone, so every response has a positive advantage."""
    with real_run(tmp_path, *SMALL, "algorithm.objective=luffy", "rollout.guided=0") as run:
        local = run.local()
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        for line in run.metrics():
            assert line["likelihood_loss"] < 0  # -f(p) A
            assert line["loss"] == pytest.approx(line["grpo_loss"] + line["likelihood_loss"])
            assert (line["alpha"], line["pass_guided"]) == (0, None)
            sampled = sum(line["lag_histogram"].values())
            assert 4 * 26 >= line["tokens"] - sampled > 0  # per response: five steps of five words and an end token


@pytest.mark.slow
def test_a_run_with_corrected_pass_rates_and_an_ema_teacher_trains_and_resumes(tmp_path: Path) -> None:
    overrides = ("algorithm.teacher=ema", "algorithm.pass_rates=corrected", "algorithm.limiter=clamp")
    with real_run(tmp_path, *SMALL, *overrides, "algorithm.divergence=jensen-shannon") as run:
        local = run.local("learner.checkpoint_every=1")
        assert local.wait() == 0, local.output
        for line in run.metrics():
            assert 0 < line["alpha"] <= 1.6 and 0 < line["alpha_observed"] <= 1.6
            assert 0 <= line["p_auto_corrected"] <= line["p_guide_corrected"] <= 1
            assert line["targets"] > 0 and line["kd_loss"] > 0
            assert line["tokens_forward_only"] > line["tokens"]
        assert run.summary()["teacher_mb"] > 0.1
        run.resume(steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("resumes", [False, True])
def test_the_behaviour_policy_teaches_without_a_teacher_copy_or_forward_pass(tmp_path: Path, resumes: bool) -> None:
    """The engine's likely tokens reach the learner by message; a checkpoint keeps them in the hub's state."""
    overrides = ("algorithm.teacher=behaviour", "algorithm.teacher_top_k=5")
    with real_run(tmp_path, *SMALL, "algorithm.kl_correction.mode=prefix", "algorithm.teacher_temperature=1") as run:
        local = run.local(*overrides, "learner.checkpoint_every=1")
        assert local.wait() == 0, local.output
        for line in run.metrics():
            assert line["targets"] > 0 and line["kd_loss"] > 0 and line["alpha"] > 0
            assert line["tokens_forward_only"] == 0
            assert line["kl_correction_mean"] == 1  # the teacher is the policy that sampled
        assert run.summary()["teacher_mb"] == 0
        if not resumes:
            return
        run.resume(*overrides, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in builtin_names() if name.startswith("builtin:methods/")])
def test_every_method_near_sgpo_trains_and_resumes(tmp_path: Path, name: str) -> None:
    """Hub, actors and learner agree on the context: rollouts, teacher's prompts, held-out problems."""
    with real_run(tmp_path, *SMALL) as run:
        local = run.local(name, "learner.checkpoint_every=1")
        assert local.wait() == 0, local.output
        lines = run.metrics()
        assert len(lines) == 2 and all(line["tokens"] > 0 or line["pass_auto"] == 0 for line in lines)
        run.resume(name, steps=3)


def test_a_source_without_responses_is_refused_at_once(tmp_path: Path) -> None:
    problems = tmp_path / "sums.jsonl"
    problems.write_text("".join(f'{{"problem": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(20)))
    with real_run(tmp_path, *SMALL, "algorithm.objective=hpt", "tasks.source=file", f"tasks.path={problems}") as run:
        local = run.local()
        assert local.wait() == 2, local.output
        (line,) = [line for line in local.output.splitlines() if line.startswith("error: ")]
        reason = "algorithm.objective=hpt needs responses, but no training problem has one"
        assert f"{problems}: {reason}; add the column 'response', or choose sgpo or grpo" in line
        run.assert_cleaned_up()

"""What people see of a run: samples, logs, the watching display, the report; also after an interrupt."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from run_support import ROOT, RealRun, real_run, until

from sgpo_async.metrics.samples import read_samples
from sgpo_async.model.folder import load_tokenizer
from sgpo_async.tasks.sources import source_of

pytestmark = pytest.mark.process
STEPS = 4
PROBLEMS = 4  # per step, all of which are kept
ADDRESS = "hub.address=tcp://127.0.0.1:0"


def sgpo(*arguments: str) -> str:
    """Run a command to its end; return what it printed."""
    command = [sys.executable, "-m", "sgpo_async.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout


def check_samples(run: RealRun) -> None:
    """Since all groups are kept, their means are the metrics of the steps."""
    lines, samples = run.metrics(), read_samples(run.folder)
    assert [sample["step"] for sample in samples] == [step for step in range(1, STEPS + 1) for _ in range(PROBLEMS)]
    assert len({sample["task"] for sample in samples}) == STEPS * PROBLEMS
    source, end = source_of(run.settings), load_tokenizer(str(run.folder / "policy")).eos_token
    for line in lines:
        own = [sample for sample in samples if sample["step"] == line["step"]]
        assert fmean(sample["alpha"] for sample in own) == pytest.approx(line["alpha"])
        rollouts = [rollout for sample in own for rollout in sample["rollouts"]]
        for guided, rate in ((False, line["pass_auto"]), (True, line["pass_guided"])):
            assert fmean(one["correct"] for one in rollouts if one["guided"] == guided) == pytest.approx(rate)
        distilled = [rollout["kl"] for rollout in rollouts if "kl" in rollout]
        assert len(distilled) == line["targets"] and all(first is None for first, *_ in distilled)  # distil_skip=1
        assert fmean(d for _, *rest in distilled for d in rest) == pytest.approx(line["kl_mean"], abs=1e-4)
        assert {sample["version"] for sample in own} == {line["version"] - 1}
        newest = max(version for rollout in rollouts for version in rollout["versions"])
        assert newest <= line["version"] - 1
    for sample in samples:
        problem = source.training(sample["task"])
        assert (sample["problem"], sample["strategy"]) == (problem.problem, problem.strategy)
        assert [rollout["slot"] for rollout in sample["rollouts"]] == list(range(run.settings.rollout.size))
        assert all(one["text"].endswith(end) == (one["finish"] == "stop") for one in sample["rollouts"])


def test_a_run_of_several_processes_speaks_and_can_be_read(tmp_path: Path) -> None:
    overrides = (f"steps={STEPS}", ADDRESS, f"learner.samples={PROBLEMS}")
    with real_run(tmp_path, *overrides, "learner.checkpoint_every=2") as run:
        hub = run.hub()
        watch = run.start("watch", "-m", "sgpo_async.cli", "watch", "--hub", run.address())
        actor, learner = run.actor("first"), run.learner("--hub", run.address())
        assert (learner.wait(), actor.wait(), hub.wait(), watch.wait()) == (0, 0, 0, 0), learner.output + watch.output
        run.assert_cleaned_up()

        check_samples(run)
        for text in (
            "listening at tcp://127.0.0.1:",
            "the learner has joined with 2 ranks",
            "first has joined; actors: 1",
            "first has left: finished; actors: 0",
            f"the run has ended at step {STEPS} of {STEPS}: finished",
        ):
            assert text in hub.output, hub.output
        for text in (
            f"training run: {STEPS} steps of {PROBLEMS} problems with sgpo on 2 ranks",
            f"step 1/{STEPS}  loss ",
            f"step {STEPS}/{STEPS}  loss ",
            "checkpoints/step-00000002",
            f"finished after {STEPS} steps: the policy is in {run.folder}/policy",
            f"report: {run.folder}/report.html",
        ):
            assert learner.output.count(text) == 1, (text, learner.output)
        for text in ("engine ready after", "joined the run at tcp://", "leaves: finished"):
            assert text in actor.output, actor.output
        assert re.search(r"^run ended: finished$", watch.output, re.MULTILINE), watch.output
        assert "the hub does not know loss" in watch.output
        assert f"{STEPS * PROBLEMS} trained" in watch.output, "the last status has the final ledger"

        page = (run.folder / "report.html").read_text()
        assert page.count("<details") >= 3 and "<mark " in page and "interrupted" not in page
        assert "interrupted" not in run.summary()
        printed = sgpo("samples", str(run.folder), "--step", "2")
        assert printed.count("task ") == PROBLEMS and "divergence in nats" in printed

        shutil.move(run.folder / "policy", tmp_path / "moved")
        sample = read_samples(run.folder)[-1]
        tried = sgpo("chat", str(run.folder), "--problem", sample["problem"], "--strategy", sample["strategy"])
        assert f"checkpoints/step-0000000{STEPS}, written" in tried and "with the strategy" in tried


@pytest.mark.slow
def test_an_interrupted_learner_leaves_a_report_and_a_summary(tmp_path: Path) -> None:
    with real_run(tmp_path, "steps=1000", ADDRESS) as run:
        run.hub("--log-format", "json")
        watch = run.start("watch", "-m", "sgpo_async.cli", "watch", "--hub", run.address())
        run.actor("first")
        learner = run.learner("--hub", run.address(), "--log-format", "json", ranks=1)
        until(lambda: len(run.metrics()) >= 2, "two steps")
        until(lambda: "step " in watch.output, "a line of the watching display")
        learner.process.send_signal(signal.SIGINT)
        assert learner.wait() != 0
        summary = run.summary()
        assert summary["interrupted"] is True
        assert summary["steps"] == run.metrics()[-1]["step"]
        assert "interrupted after" in (run.folder / "report.html").read_text()
        logged = [json.loads(line) for line in learner.output.splitlines() if line.startswith("{")]
        steps = [line for line in logged if line.get("event") == "step"]
        assert steps[0]["step"] == 1 and steps[0]["steps"] == 1000
        assert steps[0]["loss"] == pytest.approx(run.metrics()[0]["loss"])
        (hub,) = run.processes_with("hub", str(run.config))
        hub.terminate()
        assert watch.wait() == 0, watch.output
        assert "run ended: the hub received SIGTERM" in watch.output


def test_watching_a_hub_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with real_run(tmp_path) as run:
        watch = run.start("watch", "-m", "sgpo_async.cli", "watch", "--hub", "tcp://127.0.0.1:9")
        assert watch.wait() == 2
        assert "error: hub tcp://127.0.0.1:9: no answer within 30 s" in watch.output
        assert "Traceback" not in watch.output

"""A learner and its hub have one configuration, and the run's folder holds what was really run."""

import shutil
from pathlib import Path

import pytest
from run_support import ROOT, real_run, users_torchrun

from sgpo_async.config import load

pytestmark = pytest.mark.process


def test_a_learner_with_other_settings_than_its_hub_is_refused(tmp_path: Path) -> None:
    """Before it writes anything; torchrun's report ends with the same line."""
    with real_run(tmp_path, "steps=50", "learner.problems_per_step=16", "hub.address=tcp://127.0.0.1:0") as run:
        run.hub()
        address = run.address()
        different = ["rollout.autonomous=4", "learner.problems_per_step=8", "steps=12", "hub.max_lag=0"]
        before = sorted(run.folder.iterdir())
        learner = run.learner(*different, "rollout.temperature=0.5", "--hub", address)
        assert learner.wait() != 0
        (line,) = [line for line in learner.output.splitlines() if line.startswith("error: ")]
        assert "rollout.autonomous must be 8 as in the hub's configuration, got 4; " in line
        assert all(f"{one.partition('=')[0]} must be " in line for one in different) and "rollout.temperature" in line
        assert f"traceback : {line.removeprefix('error: ')}" in learner.output
        assert sorted(run.folder.iterdir()) == before


@pytest.mark.slow
def test_a_learner_takes_what_it_leaves_out_from_its_hub(tmp_path: Path) -> None:
    """Its own file sets only what differs between machines: where it writes, and how it computes."""
    with real_run(tmp_path, "steps=2", "seed=3", "hub.address=tcp://127.0.0.1:0") as run:
        own = tmp_path / "own.yaml"
        out = tmp_path / "elsewhere"
        own.write_text(f"out: {out}\nlearner: {{row_tokens: 512, problems_per_step: 4}}\n")
        hub, actor = run.hub(), run.actor("actor")
        # Without keys, a learner with another folder has to be given the hub's token.
        address = run.address()
        (out / "run").mkdir(parents=True)
        shutil.copy(run.folder / "hub.token", out / "run" / "hub.token")
        command = [*users_torchrun(2), str(ROOT / "launch/learner.py"), str(own), "--hub", address]
        learner = run.start("learner", *command)
        assert (learner.wait(), hub.wait(), actor.wait()) == (0, 0, 0), learner.output
        expected = load(run.config, [f"out={out}", "learner.row_tokens=512"])
        assert load(out / "run" / "config.yaml", [f"hub.address={expected.hub.address}"]) == expected
        assert (out / "run" / "policy" / "model.safetensors").exists() and not (run.folder / "config.yaml").exists()
        run.assert_cleaned_up()

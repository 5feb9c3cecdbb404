"""A run without a separate hub: rank 0 of the learner starts one. With hub.max_lag=0 no stale token is trained."""

from pathlib import Path

import pytest
from run_support import assert_all_trained, assert_right_weights, free_port, real_run

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_a_learner_starts_its_own_hub_and_trains_at_lag_zero(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, "steps=4", f"hub.address={address}", "hub.max_lag=0") as run:
        actors = [run.actor(name, hub=address) for name in ("first", "second")]  # started before the hub
        learner = run.learner()
        assert learner.wait() == 0, learner.output
        assert f"the hub beside this learner is {address}, its log {run.folder}/logs/hub.log" in learner.output
        assert [actor.wait() for actor in actors] == [0, 0]
        run.assert_cleaned_up()
        summary = run.summary()
        assert summary["lag_max"] == summary["lag_mean"] == 0
        assert summary["weight_version"] == summary["steps"] == 4
        assert_all_trained(summary["ledger"], tasks=4 * 4, size=run.settings.rollout.size)
        assert_right_weights(summary)
        assert (run.folder / "policy" / "model.safetensors").exists()

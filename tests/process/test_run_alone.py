"""torchrun alone: rank 0 brings the hub with it. Two actors, synchronous: no token of an older version is trained."""

from pathlib import Path

import pytest
from run_support import assert_all_trained, free_port, real_run

pytestmark = pytest.mark.process


def test_a_learner_starts_its_own_hub_and_lag_zero_is_synchronous(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, "steps=4", f"hub.address={address}", "hub.max_lag=0") as run:
        actors = [run.actor(name, hub=address) for name in ("first", "second")]  # before there is a hub
        learner = run.learner()
        assert learner.ended() == 0, learner.output
        assert [actor.ended() for actor in actors] == [0, 0]
        run.assert_no_trace()
        summary = run.summary()
        assert summary["lag_max"] == summary["lag_mean"] == 0
        assert summary["weight_version"] == summary["steps"] == 4
        assert_all_trained(summary["ledger"], tasks=4 * 4, size=run.run.rollout.size)
        assert (run.folder / "policy" / "model.safetensors").exists()

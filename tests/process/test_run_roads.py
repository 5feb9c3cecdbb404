"""Weights by each road, in one run: Torch RPC, connections that only the actor opens, and a folder in S3."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from run_support import assert_all_trained, real_run, until
from s3_support import s3_service

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
ROADS = ("rpc", "sockets", "folder")
STEPS = 40


@pytest.mark.slow
def test_actors_that_have_their_weights_by_each_road_train_one_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        s3_service(monkeypatch) as bucket,
        real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", f"hub.weight_folder={bucket}/w") as run,
    ):
        hub = run.hub()
        learner = run.learner("--hub", run.address(), ranks=1)
        actors = [run.actor(road, "--weights-by", road, "--own-store") for road in ROADS]
        until(lambda: all(run.actor_row(road).get("version", -1) > 0 for road in ROADS), "a version after the first")
        assert learner.wait() == 0, learner.output
        assert [actor.wait() for actor in actors] == [0, 0, 0], actors[-1].output
        assert hub.wait() == 0, hub.output
        ledger = run.summary()["ledger"]
        assert_all_trained(ledger, tasks=STEPS * 4, size=run.settings.rollout.size)
        samples = (run.folder / "samples.jsonl").read_text()
        assert samples, "what was trained can be read"
        s3 = fsspec.filesystem("s3")
        (folder,) = s3.ls(f"{bucket}/w")
        kept = s3.ls(folder)
        assert len([name for name in kept if "/v0" in name]) == 2, "the two newest versions stay"
        run.assert_cleaned_up()

"""Trials in this process, and a complete experiment that is killed and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sgpo_async.config import load
from sgpo_async.config.experiment import Base
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.identity import identity
from sgpo_async.experiments.trial import TrialRun
from sgpo_async.experiments.work import BaseJob, make_base

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_rank")]

OVERRIDES = ["local.ranks=1", "local.actors=1", "learner.problems_per_step=2", "tasks.held_out=4", "evaluation.every=2"]
DEMO = Path("configs/demo.yaml").resolve()


def test_every_token_has_exactly_the_configured_lag() -> None:
    trial = TrialRun(load(DEMO, [*OVERRIDES, "steps=4", "hub.max_lag=2", "optim.lr=1e-2", "optim.warmup_steps=0"]))
    lags, mismatches = [], []
    for step in range(4):
        shard = trial._shard(step)
        lags.append({step - int(v) for rollout in shard.rollouts for v in rollout.versions})
        mismatches.append(trial.stepper.update(shard)["mismatch_mean_stale_first"])
        trial.history.append(trial._weights())
    assert lags == [{0}, {1}, {2}, {2}]
    # From step 1 on, tokens come from older weights than those in training.
    assert mismatches[0] is None
    assert min(mismatches[1:]) > 1e-4


def test_a_trial_is_reproducible_and_its_problem_sets_are_disjoint() -> None:
    overrides = [*OVERRIDES, "steps=3", "hub.max_lag=1", "engine.deterministic=true"]
    first, second = (TrialRun(load(DEMO, overrides)).train() for _ in range(2))
    assert first["curve"] == second["curve"]
    assert [point["step"] for point in first["curve"]] == [0, 2, 3]
    assert [point["rollouts"] for point in first["curve"]] == [0, 48, 72]
    assert first["curve"][0].keys() == {"step", "rollouts", "auto", "guided"}
    assert first["curve"][1]["grpo_loss"] == pytest.approx(0, abs=1)
    assert first["diverged"] is None
    other = TrialRun(load(DEMO, [*overrides, "seed=1"]))
    assert other.training.task(0).problem != TrialRun(load(DEMO, overrides)).training.task(0).problem
    validation, test = ([c.task(-1 - i).problem for i in range(c.round_size)] for c in (other.training, other.test))
    assert validation == [TrialRun(load(DEMO, overrides)).training.task(-1 - i).problem for i in range(len(validation))]
    assert not set(validation) & set(test)


@pytest.mark.parametrize(("method", "guided"), [([], 0.0), (["builtin:methods/rlcsd"], None)])
def test_a_diverging_run_gives_a_result_with_pass_rate_zero(method: list[str], guided: float | None) -> None:
    optimiser = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.schedule=constant"]
    result = TrialRun(load(DEMO, [*method, *OVERRIDES, "steps=6", "hub.max_lag=0", *optimiser])).train()
    assert result["diverged"]["step"] < 6
    assert "give NaN logits" in result["diverged"]["why"] or "norm" in result["diverged"]["why"]
    assert result["test"] == {"auto": 0.0, "guided": guided}


def test_a_base_whose_training_diverges_is_not_made(tmp_path: Path) -> None:
    train = {"optim.lr": 1e30, "optim.warmup_steps": 0}
    overrides = (*OVERRIDES, "steps=6", "hub.max_lag=0", *(f"{key}={value}" for key, value in train.items()))
    base = Base(start="builtin:cues", train=train)
    job = BaseJob("warm", base, "builtin:cues", str(tmp_path / "warm"), str(DEMO), overrides, {})
    with pytest.raises(
        SgpoError, match=r"bases\.warm\.train: must finish its 6 steps, diverged at step \d .*optim\.lr"
    ):
        make_base(job)
    assert not [*tmp_path.iterdir()]


def experiment(folder: Path) -> tuple[Path, list[str]]:
    content: dict[str, Any] = {
        "name": "tiny",
        "config": str(DEMO),
        "common": {"steps": 2, "hub.max_lag": 1} | dict(override.split("=") for override in OVERRIDES),
        "bases": {
            "warm": {"start": "builtin:cues", "train": {"steps": 1, "optim.lr": 1e-3}},
            "sparse": {"start": "builtin:cues", "steps": 2, "p_true": 0.3, "p_favourite": 0.5},
        },
        "settings": {"plain": {}, "sparse": {"model.path": "base:sparse"}},
        "methods": {"SGPO": {}, "again": {"model.path": "base:warm"}},
        "seeds": [0, 1],
        "tune": {"rates": [1e-4, 1e-3]},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "sgpo_async.cli", "experiment", str(path), "--out", str(folder), "--workers", "2"]
    return folder / "tiny", command


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_experiment_resumes_and_repeats_no_trial(tmp_path: Path) -> None:
    folder, command = experiment(tmp_path)
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 400
        while len(list(tmp_path.glob("results/*.json"))) < 3 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("results/*.json")}
    assert 3 <= len(before) < 12

    subprocess.run(command, check=True, timeout=400)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("results/*.json")}
    # `again` names its own model, so both settings share its trials: 3 combinations x (2 learning rates + 2 seeds).
    assert len(after) == 3 * (2 + 2)
    assert {name: after[name] for name in before} == before
    for path in tmp_path.glob("results/*.json"):
        record = json.loads(path.read_text())
        assert {"version", "commit"} <= record.keys()
        assert identity(record["config"]) == path.stem
    assert not list(tmp_path.glob("results/.*"))
    warm = json.loads((tmp_path / "bases" / "warm" / "base.json").read_text())
    assert warm["pass_rates"].keys() == {"auto", "guided"}
    assert warm["recipe"]["trained"]["steps"] == 1
    table = (folder / "README.md").read_text()
    assert table.count("| SGPO |") == 5  # the overview; for each setting, its results and the tuning of learning rates
    assert table.count("| 2 |") == 4
    figures = {path.name for path in folder.glob("*.svg")}
    assert figures == set(re.findall(r"\]\((.*?\.svg)\)", table))
    assert figures >= {f"{kind}-{setting}.svg" for kind in ("curves", "entropy") for setting in ("plain", "sparse")}

    collected, again = tmp_path / "collected", tmp_path / "again"
    subprocess.run([*command, "--collect", str(collected)], check=True, timeout=400)
    subprocess.run(
        [*command, "--out", str(again), "--from", str(collected / "trials.parquet")], check=True, timeout=400
    )
    assert {path.name for path in again.glob("results/*.json")} == after.keys()
    assert (again / "tiny" / "README.md").read_text() == (collected / "tiny" / "README.md").read_text() == table
    assert {path.name for path in again.glob("tiny/*.svg")} == figures
    assert {path.name for path in collected.glob("bases/*")} == {"warm.json", "sparse.json"}

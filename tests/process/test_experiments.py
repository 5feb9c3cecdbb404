"""Trials in this process, and a whole experiment that is killed and goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import yaml

from sgpo_async.config import load
from sgpo_async.experiments.identity import identity
from sgpo_async.experiments.trial import Trial
from sgpo_async.learner.process_group import join_alone

pytestmark = pytest.mark.process

WORDS = ["local.ranks=1", "local.actors=1", "learner.problems_per_step=2", "tasks.held_out=4", "evaluation.every=2"]
DEMO = Path("configs/demo.yaml").resolve()


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    join_alone()
    yield
    dist.destroy_process_group()


def test_every_token_is_exactly_as_old_as_the_lag() -> None:
    trial = Trial(load(DEMO, [*WORDS, "steps=4", "hub.max_lag=2", "optim.lr=1e-2", "optim.warmup_steps=0"]))
    lags, entropies = [], []
    for step in range(4):
        shard = trial._shard(step)
        lags.append({step - int(v) for rollout in shard.rollouts for v in rollout.versions})
        entropies.append(trial.stepper.update(shard)["mismatch_mean_stale_first"])
        trial.history.append(trial._weights())
    assert lags == [{0}, {1}, {2}, {2}]
    # The tokens of steps 1 to 3 come from weights that are not the ones in training.
    assert entropies[0] is None
    assert min(entropies[1:]) > 1e-4


def test_a_trial_repeats_itself_and_measures_what_it_says() -> None:
    words = [*WORDS, "steps=3", "hub.max_lag=1", "engine.deterministic=true"]
    first, second = (Trial(load(DEMO, words)).train() for _ in range(2))
    assert first["curve"] == second["curve"]
    assert [point["step"] for point in first["curve"]] == [0, 2, 3]
    assert [point["rollouts"] for point in first["curve"]] == [0, 48, 72]
    assert first["curve"][0].keys() == {"step", "rollouts", "auto", "guided"}
    assert first["curve"][1]["grpo_loss"] == pytest.approx(0, abs=1)
    assert first["diverged"] is None
    other = Trial(load(DEMO, [*words, "seed=1"]))
    assert other.training.task(0).problem != Trial(load(DEMO, words)).training.task(0).problem
    validation, test = ([c.task(-1 - i).problem for i in range(c.round_size)] for c in (other.training, other.test))
    assert validation == [Trial(load(DEMO, words)).training.task(-1 - i).problem for i in range(len(validation))]
    assert not set(validation) & set(test)


def test_a_run_that_diverges_is_a_result() -> None:
    words = [*WORDS, "steps=6", "hub.max_lag=0", "optim.lr=1e30", "optim.warmup_steps=0", "optim.schedule=constant"]
    result = Trial(load(DEMO, words)).train()
    assert result["diverged"]["step"] < 6
    assert "give NaN logits" in result["diverged"]["why"] or "norm" in result["diverged"]["why"]
    assert result["test"] == {"auto": 0.0, "guided": 0.0}


def experiment(folder: Path) -> tuple[Path, list[str]]:
    content: dict[str, Any] = {
        "name": "tiny",
        "config": str(DEMO),
        "common": {"steps": 2, "hub.max_lag": 1} | dict(word.split("=") for word in WORDS),
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


@pytest.mark.timeout(900)
def test_an_experiment_killed_in_the_middle_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
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
    # `again` names its own model, so it is the same in both settings: 3 cells x (2 rates to tune + 2 seeds).
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
    assert table.count("| SGPO |") == 5  # the overview, and for each setting a table and what its rates scored
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

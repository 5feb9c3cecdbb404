"""The warm-up under torchrun: one rank, two ranks, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgpo_async.local.children import ROOT
from sgpo_async.processes.torchrun import torchrun

pytestmark = pytest.mark.process

OVERRIDES = ["sft.problems=96", "sft.batch=16", "sft.epochs=3", "sft.lr=1e-3", "sft.validate_every=3"]
DEADLINE_S = 240.0


def command(folder: Path, name: str, *overrides: str, ranks: int = 1) -> list[str]:
    config = ["configs/demo.yaml", f"out={folder}", f"name={name}", *OVERRIDES, *overrides]
    return [*torchrun(ranks), "launch/sft.py", *config]


def warm_up(folder: Path, name: str, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Run a warm-up to its end; return the lines of its metrics."""
    done = subprocess.run(
        command(folder, name, *overrides, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return lines(folder / name)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict[str, Any]]) -> list[tuple[float, float | None]]:
    return [(line["train_loss"], line.get("validation_loss")) for line in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def one(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a warm-up on one rank."""
    return warm_up(folder, "one")


def test_the_loss_falls_and_the_best_policy_is_exported(folder: Path, one: list[dict[str, Any]]) -> None:
    summary = json.loads((folder / "one" / "summary.json").read_text())
    validated = {line["step"]: line["validation_loss"] for line in one if "validation_loss" in line}
    assert list(validated) == [3, 6, 9, 12, 15, 18]  # 86 training problems: 6 steps per epoch
    assert summary["best_loss"] == min(validated.values())
    assert validated[summary["best_step"]] == summary["best_loss"] < validated[3]
    assert one[-1]["train_loss"] < one[0]["train_loss"]
    assert (summary["training"], summary["validation"], summary["too_long"]) == (86, 10, 0)
    model = AutoModelForCausalLM.from_pretrained(folder / "one" / "warmup")
    assert model.num_parameters() > 100_000
    assert len(AutoTokenizer.from_pretrained(folder / "one" / "warmup")) == model.config.vocab_size


def test_two_ranks_give_the_same_losses_as_one(folder: Path, one: list[dict[str, Any]]) -> None:
    two = warm_up(folder, "two", ranks=2)
    for key in ("train_loss", "validation_loss"):
        found, expected = ([line[key] for line in run if key in line] for run in (two, one))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def long(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a longer warm-up that was not interrupted."""
    return warm_up(folder, "uninterrupted", "sft.epochs=10")


@pytest.mark.slow
def test_a_killed_and_resumed_warm_up_equals_an_uninterrupted_one(folder: Path, long: list[dict[str, Any]]) -> None:
    overrides = ["learner.checkpoint_every=2", "sft.epochs=10"]
    process = subprocess.Popen(
        command(folder, "killed", *overrides),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints, deadline = folder / "killed" / "warmup-checkpoints", time.monotonic() + DEADLINE_S
    while not list(checkpoints.glob("step-*6")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(120)

    resumed = warm_up(folder, "killed", *overrides, "learner.resume=true")
    assert [line["step"] for line in resumed] == list(range(1, 61))
    assert losses(resumed) == losses(long)
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("killed", "uninterrupted")]
    assert summaries[0]["best_loss"] == summaries[1]["best_loss"]


@pytest.mark.slow
def test_a_stopped_and_resumed_warm_up_equals_an_uninterrupted_one(folder: Path, long: list[dict[str, Any]]) -> None:
    """SIGTERM to torchrun: the ranks save their last step, and one line says how to go on."""
    process = subprocess.Popen(
        command(folder, "stopped", "sft.epochs=10", ranks=2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = folder / "stopped" / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, output = process.communicate(timeout=DEADLINE_S)
    last = lines(folder / "stopped")[-1]["step"]
    assert process.returncode != 0 and last < 60
    (line,) = [
        line for line in output.splitlines() if line.startswith(f"interrupted after step {last}: learner rank 0 ")
    ]
    assert line.endswith(" learner.resume=true")
    assert not (folder / "stopped" / "summary.json").exists()
    resumed = warm_up(folder, "stopped", "sft.epochs=10", "learner.resume=true", ranks=2)
    assert [line["step"] for line in resumed] == list(range(1, 61))
    found, expected = ([line["train_loss"] for line in run] for run in (resumed, long))
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)  # rounding differs with the alignment of memory

"""Disk and open files: one line at the start, and nothing started or written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_async.cli import resources
from sgpo_async.cli.resources import LOGS, OPEN_FILES, check_resume, check_start, disk, open_files
from sgpo_async.config import Run, load
from sgpo_async.errors import CheckFailed
from sgpo_async.model.folder import stored_parameters

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
MILLION = 10**6


def settings(place: Path, *words: str) -> Run:
    return load(DEMO, [f"out={place}", *words])


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free space of every disk, in a list so that a test can change it."""
    bytes_left = [0]
    monkeypatch.setattr(resources, "free", lambda _folder: bytes_left[0])
    return bytes_left


@pytest.mark.parametrize(
    ("words", "parameters", "needed", "what"),
    [
        ([], 0, LOGS, "logs"),
        ([], MILLION, LOGS + 40 * MILLION, "3 checkpoints, the policy and logs"),
        (["learner.checkpoint_minutes=0"], MILLION, LOGS + 16 * MILLION, "1 checkpoint, the policy and logs"),
        (["optim.state=bfloat16"], MILLION, LOGS + 28 * MILLION, "3 checkpoints, the policy and logs"),
        (
            ["learner.checkpoint_every=5", "learner.keep_checkpoints=3"],
            MILLION,
            LOGS + 52 * MILLION,
            "4 checkpoints, the policy and logs",
        ),
    ],
)
def test_a_disk_needs_room_for_checkpoints_policy_and_logs(
    room: list[int], tmp_path: Path, words: list[str], parameters: int, needed: int, what: str
) -> None:
    run = settings(tmp_path, *words)
    room[0] = needed
    assert disk(run, parameters)
    room[0] = needed - 1
    with pytest.raises(CheckFailed, match=f"out: {tmp_path} has .*, and {what} need .*; free some space, set out=DIR"):
        disk(run, parameters)


def test_a_resumed_run_replaces_its_checkpoints(room: list[int], tmp_path: Path) -> None:
    run = settings(tmp_path, "learner.resume=true")
    old = Path(run.folder, "checkpoints", "step-00000001")
    old.mkdir(parents=True)
    (old / "shard").write_bytes(b"x" * 1000)
    room[0] = LOGS - 1000
    assert disk(run, 0)
    with pytest.raises(CheckFailed, match="logs need"):
        disk(settings(tmp_path, "learner.resume=false"), 0)


def test_a_model_is_measured_by_its_files(tmp_path: Path) -> None:
    assert stored_parameters("builtin:cues") == 167_456
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert stored_parameters(str(tmp_path)) == 0, "loading it names the file"
    assert stored_parameters("owner/name-on-the-hub") == 0


def test_only_a_command_that_writes_checkpoints_needs_room_for_them(room: list[int], tmp_path: Path) -> None:
    run = settings(tmp_path)
    room[0] = LOGS
    check_start(run, checkpoints=False)
    with pytest.raises(CheckFailed, match="3 checkpoints, the policy and logs need"):
        check_start(run, checkpoints=True)


@pytest.mark.parametrize("folder", ["checkpoints", "warmup-checkpoints"])
def test_a_run_that_must_resume_needs_a_checkpoint(tmp_path: Path, folder: str) -> None:
    for resume in ("auto", "false"):
        check_resume(settings(tmp_path, f"learner.resume={resume}"), folder)
    run = settings(tmp_path, "learner.resume=true")
    (tmp_path / "demo" / folder / ".step-00000003").mkdir(parents=True)  # one that was not written completely
    with pytest.raises(CheckFailed, match=f"learner.resume=true: {tmp_path}/demo/{folder} has no checkpoint; correct "):
        check_resume(run, folder)
    (tmp_path / "demo" / folder / "step-00000002").mkdir()
    check_resume(run, folder)


def test_the_hub_needs_open_files_for_every_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 4096))
    assert open_files(2) == "up to 1024 in each process"
    with pytest.raises(CheckFailed, match="may have 1024, and a run with 100 actors needs 1056; .* ulimit -n 1056"):
        open_files(100)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert open_files(10_000) == "no limit"


@pytest.mark.parametrize("limit", [40, pytest.param(OPEN_FILES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["local", "hub", "learner", "actor", "doctor"])
def test_too_few_open_files_end_a_command_with_one_line(command: str, limit: int, tmp_path: Path) -> None:
    configuration = [str(DEMO), f"out={tmp_path}"]
    words = ["--hub", "tcp://127.0.0.1:9"] if command == "actor" else configuration
    answer = subprocess.run(
        [sys.executable, "-m", "sgpo_async.cli", command, *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        env=os.environ | {"RANK": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    actors = 1 if command == "actor" else 2
    expected = f"open files: this process may have {limit}, and a run with {actors} actors needs"
    assert answer.returncode == 2
    if command == "doctor":
        assert "raise the limit: ulimit -n 1024" in answer.stdout
    else:
        (line,) = answer.stderr.splitlines()
        assert line.startswith(f"error: {expected}") and line.endswith("; raise the limit: ulimit -n 1024")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_adapters_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free", lambda _: 40 * 10**9)
    with pytest.raises(CheckFailed, match="the policy and logs need 3"):
        disk(settings(tmp_path), 7_600_000_000)
    assert disk(settings(tmp_path, "learner.lora.rank=32"), 7_600_000_000)

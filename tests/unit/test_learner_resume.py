"""Whether a start of the learner continues an earlier one, from which checkpoint, and what it moves aside otherwise."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sgpo_async.config import from_plain, load
from sgpo_async.config.schema import CHECKPOINTS
from sgpo_async.errors import CheckpointError, ConfigError
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.resume import JOB, continues, resume_point
from tests.reference import learner_cases as cases


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_values_of_before_still_work(value: Any) -> None:
    assert load("", [f"learner.resume={str(value).lower()}"]).learner.resume is value or value == "auto"
    assert from_plain({"learner": {"resume": value}}).learner.resume == value
    assert load("").learner.resume == "auto"


@pytest.mark.parametrize("value", ["maybe", "1", "null"])
def test_another_value_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"learner\.resume"):
        load("", [f"learner.resume={value}"])


FIRST: dict[str, str] = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("recorded", "environment", "restarted"),
    [
        (None, {}, False),
        (None, FIRST, False),
        ("", FIRST, False),
        ("none", FIRST, False),
        ("7", FIRST, False),
        ("7", FIRST | {"TORCHELASTIC_RUN_ID": "8"}, False),
        ("7", FIRST | {"TORCHELASTIC_RUN_ID": "7"}, True),
        (None, FIRST | {"TORCHELASTIC_RUN_ID": "7"}, False),
        (None, FIRST | {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ("7", FIRST | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "8"}, True),
    ],
)
def test_auto_continues_the_same_job(
    tmp_path: Path, recorded: str | None, environment: dict[str, str], restarted: bool
) -> None:
    if recorded is not None:
        (tmp_path / JOB).write_text(recorded)
    assert continues("auto", tmp_path, environment) == restarted
    assert continues(True, tmp_path, environment)
    assert not continues(False, tmp_path, environment)


@pytest.fixture
def step_3(tmp_path: Path, one_rank: None) -> Path:
    """A checkpoint, outside of any run."""
    stepper = cases.stepper(cases.settings(), cases.tiny_model())
    with CheckpointWriter(tmp_path / "kept", keep=1) as writer:
        writer.save(step=3, module=stepper.policy, optimiser=stepper.optimiser, saved=Saved({}, b""))
    return tmp_path / "kept" / "step-00000003"


def start(place: Path, resume: str, monkeypatch: pytest.MonkeyPatch, *, job: str = "none", restarts: int = 0) -> Any:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    run = load("", [f"out={place}", "name=run", f"learner.resume={resume}"])
    found = resume_point(run, Path(run.folder) / CHECKPOINTS)
    return found and found.name


@pytest.mark.parametrize(
    ("resume", "job", "resumed"),
    [
        ("auto", "none", False),
        ("auto", "none restarted", True),
        ("auto", "7", True),
        ("auto", "8", False),
        ("true", "none", True),
        ("false", "7 restarted", False),
    ],
)
def test_a_start_resumes_or_moves_the_checkpoints_aside(
    tmp_path: Path, step_3: Path, monkeypatch: pytest.MonkeyPatch, resume: str, job: str, resumed: bool
) -> None:
    folder = tmp_path / "run" / CHECKPOINTS
    assert start(tmp_path, "auto", monkeypatch, job="7") is None
    shutil.copytree(step_3, folder / step_3.name)
    (folder.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    job, _, restarted = job.partition(" ")
    assert start(tmp_path, resume, monkeypatch, job=job, restarts=int(bool(restarted))) == (
        step_3.name if resumed else None
    )
    aside = tmp_path / "run" / "checkpoints.earlier-1"
    assert (folder / step_3.name).exists() == resumed != aside.exists()
    assert (folder / JOB).read_text() == ("7" if resumed or job == "7" else job.replace("none", ""))
    # Overwriting the metrics of a run that is begun anew on purpose is what the command has announced.
    assert (folder.parent / "metrics.jsonl").exists()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("resume", "restarts"), [("true", 0), ("auto", 1)])
def test_metrics_that_cannot_be_continued_are_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, resume: str, restarts: int
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for attempt in (1, 2):
        (folder / "metrics.jsonl").write_text(f'{{"step": {attempt}}}\n')
        assert start(tmp_path, resume, monkeypatch, restarts=restarts) is None
        assert not (folder / "metrics.jsonl").exists()
        assert (folder / f"metrics.earlier-{attempt}.jsonl").read_text() == f'{{"step": {attempt}}}\n'
        assert f"moved the metrics of the earlier attempt to {folder}/metrics.earlier-{attempt}.jsonl" in caplog.text


def test_a_run_does_not_begin_anew_because_its_checkpoints_are_damaged(
    tmp_path: Path, step_3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(step_3, tmp_path / "run" / CHECKPOINTS / step_3.name))
    (copied / "progress.json").unlink()
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged \(step-00000003\); learner.resume=false"):
        start(tmp_path, "true", monkeypatch)
    assert copied.exists()

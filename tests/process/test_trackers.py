"""The real TensorBoard, W&B and MLflow: what a run writes to them, resumed runs, and servers that never answer."""

import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import psutil
import pytest
import yaml
from mlflow.tracking import MlflowClient
from run_support import ROOT, real_run, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from sgpo_async.metrics import MetricsWriter, read_metrics
from sgpo_async.metrics.names import SECTIONS, STEPS, scalars
from sgpo_async.metrics.trackers.base import COLUMNS, State, state_file

pytestmark = pytest.mark.process
ALL = ("tensorboard", "wandb", "mlflow")
SECRET = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 2**15  # of a .wandb file, which has the format of LevelDB's log


def wandb_records(folder: Path) -> list[Record]:
    """The records of a W&B run on the disk: after 7 bytes, blocks of parts (checksum, length, type, bytes)."""
    data, at, parts, records = next(folder.glob("*.wandb")).read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """Per step what the runs in runs/NAME/wandb have; an assertion fails if a step is there twice."""
    found: dict[int, dict[str, Any]] = {}
    for one in sorted(folder.glob("wandb/*run-*")):
        for record in wandb_records(one):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = record.history.step.num
                assert step not in found, f"step {step} is there twice"
                found[step] = items
    return found


def mlflow_history(folder: Path, name: str) -> list[tuple[int, float]]:
    client, run = (
        MlflowClient(tracking_uri=(folder.parent / "mlruns").as_uri()),
        State.read(state_file(folder, "mlflow")),
    )
    return [(one.step, one.value) for one in client.get_metric_history(run.id, name)]


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.fixture(autouse=True)
def _local_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")


@pytest.mark.slow
def test_a_run_and_its_continuation_are_one_run_in_every_tracker(tmp_path: Path) -> None:
    """And the table of names has exactly the keys that they write."""
    trackers = f"learner.trackers=[{','.join(ALL)}]"
    with real_run(tmp_path, "steps=3", "evaluation.every=2", trackers, "local.actors=1", "local.ranks=1") as run:
        local = run.local()
        assert local.wait() == 0, local.output
        ids = {kind: State.read(state_file(run.folder, kind)).id for kind in ALL}
        lines = run.resume(steps=6)
        run.assert_cleaned_up()
        folder = run.folder
    assert {key for line in lines for key in line} == {metric.key for metric in STEPS}
    assert {kind: State.read(state_file(folder, kind)).id for kind in ALL} == ids
    losses = [(line["step"], line["loss"]) for line in lines]
    events = board(folder)
    tags = events.Tags()["scalars"]
    assert set(tags) == {name for line in lines for name in scalars(line)}
    assert {tag.split("/")[0] for tag in tags} == set(SECTIONS)
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert events.Histograms("mismatch/lag_histogram")[-1].step == 6
    assert {"train/samples/text_summary", "config/text_summary"} <= set(events.Tags()["tensors"])
    history = wandb_history(folder)
    assert [(step, history[step]["train/loss"]) for step in sorted(history) if "train/loss" in history[step]] == losses
    tables = [json.loads(path.read_text()) for path in folder.glob("wandb/*/files/media/table/train/*.json")]
    assert tables and all(table["columns"] == list(COLUMNS) for table in tables)
    assert mlflow_history(folder, "train/loss") == losses
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    info = client.get_run(ids["mlflow"])
    assert info.info.status == "FINISHED" and info.data.params["rollout.max_new_tokens"] == "40"
    assert info.data.metrics["final/steps"] == 6
    assert [one.path for one in client.list_artifacts(ids["mlflow"])] == ["config.yaml", "samples"]


def lines_of(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "wall_s": float(step), "loss": 1 / step} for step in range(first, last + 1)]


def write(folder: Path, lines: Sequence[dict[str, Any]], *, resume_from: int = 0, kinds: Sequence[str] = ALL) -> None:
    writer = MetricsWriter(folder, resume_from=resume_from, trackers=kinds)
    for line in lines:
        writer.step(line)
    writer.close()
    writer.wait()


def write_and_die(folder: Path) -> None:
    """What a learner does that is killed after step 7."""
    writer = MetricsWriter(folder, trackers=ALL)
    for line in lines_of(1, 7):
        writer.step(line)
    until(lambda: all(State.read(state_file(folder, kind)).step == 7 for kind in ALL), "7 steps in all trackers")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_learner_that_was_killed_and_resumed_has_every_step_once(tmp_path: Path) -> None:
    """Its checkpoint is of step 5, so the steps 6 and 7 are trained twice; the trackers keep their first attempt."""
    folder = tmp_path / "run"
    program = "import sys; sys.path[:0] = sys.argv[2:]; from test_trackers import *; write_and_die(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(folder), str(Path(__file__).parent)]
    killed = run_command(command, cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    write(folder, lines_of(6, 9), resume_from=5)
    every = [(step, 1 / step) for step in range(1, 10)]
    assert [(line["step"], line["loss"]) for line in read_metrics(folder)] == every
    assert [(one.step, one.value) for one in board(folder).Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in every
    ]
    history = wandb_history(folder)
    assert [(step, history[step]["train/loss"]) for step in sorted(history)] == every
    assert mlflow_history(folder, "train/loss") == every


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in accepted:
            connection.close()


def test_servers_that_never_answer_do_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each at the end, no process is left, and no file of the run has the key."""
    caplog.set_level("INFO", logger="sgpo_async")
    folder = tmp_path / "run"
    before = set(psutil.Process().children(recursive=True))  # of earlier tests, such as a resource tracker
    with silent_server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", f"//me:{SECRET}@"))
        writer = MetricsWriter(folder, trackers=ALL)
        for line in lines_of(1, 5):
            writer.step(line)
        writer.close()
        writer.wait()
        left = set(psutil.Process().children(recursive=True)) - before
        assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    assert len(read_metrics(folder)) == 5 and len(board(folder).Scalars("train/loss")) == 5
    said = [record.getMessage() for record in caplog.records]
    for kind in ("wandb", "mlflow"):
        assert (
            len([text for text in said if text.startswith(f"tracker {kind}: ") and "go on: sgpo-async track" in text])
            == 1
        )
    assert not [text for text in said if text.startswith("tracker tensorboard")]
    assert SECRET not in "\n".join(said)
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_a_folder_that_cannot_be_written_is_reported_once_and_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where the folder belongs")
    write(folder, lines_of(1, 5), kinds=["tensorboard"])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("\n" not in text for text in said)
    assert said[0].startswith(
        "tracker tensorboard: cannot be written, is tried again, and training goes on (FileExists"
    )
    assert "5 steps are missing after" in said[1]
    assert said[1].endswith(f"; to write them: sgpo-async track {folder} tensorboard")
    (folder / "tensorboard").unlink()
    command = [sys.executable, "-m", "sgpo_async.cli", "track", str(folder), "tensorboard"]
    later = run_command(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (later.returncode, later.stdout) == (0, f"tensorboard: has the 5 steps of {folder}\n"), later.stderr
    assert [one.step for one in board(folder).Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "learner": {"trackers": ["wandB"]}}))
    command = [sys.executable, "-m", "sgpo_async.cli", "local", str(config)]
    refused = run_command(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = refused.stderr.splitlines()
    assert line.endswith("learner.trackers must be one of tensorboard, wandb, mlflow, got 'wandB'; did you mean wandb?")

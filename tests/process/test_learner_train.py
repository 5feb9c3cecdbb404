"""A complete learner of two ranks under torchrun, with a scripted hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgpo_async.config import load, to_plain
from sgpo_async.processes.torchrun import torchrun
from sgpo_async.transport import Router, RouterMailbox
from sgpo_async.weights import StoreFile, StoreReader
from sgpo_async.weights.store_file import machine
from sgpo_async.wire.records import (
    BatchRequest,
    Commit,
    Committed,
    Evaluate,
    Evaluated,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Published,
    Refused,
    Restore,
    Restored,
    Settings,
    SettingsRequest,
    Snapshot,
    SnapshotRequest,
    Status,
    StatusRequest,
    Stop,
    Welcome,
)
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 180.0
SPLIT = ((0, 1), (2, 3))


class ScriptedHub:
    """A hub without actors: every batch is available at once. It records all messages except heartbeats."""

    def __init__(self, folder: Path, *, refuses: str = "") -> None:
        self.store, self.refuses = StoreFile(folder), refuses
        self.received: list[Message] = []
        self.heartbeats = 0
        self.settings: list[str] = []  # the configuration's overrides
        self.errors = ""  # what the learner wrote to stderr
        self._ranks: dict[bytes, int] = {}
        self._base = 3
        self._router = Router("tcp://127.0.0.1:0", max_bytes=2**26)
        self._mail, self._open = RouterMailbox(self._router), True
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def address(self) -> str:
        return self._router.address

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    def close(self) -> None:
        self._open = False
        self._thread.join()
        self._mail.close()
        self.store.close()

    def _serve(self) -> None:
        while self._open:
            for member, message in self._mail.receive(0.02):
                assert not isinstance(message, Exception)
                if isinstance(message, Heartbeat):
                    self.heartbeats += 1
                    continue
                self.received.append(message)
                for answer in self._answers(member, message):
                    self._mail.send(member, answer)

    def _answers(self, member: bytes, message: Message) -> list[Message]:
        match message:
            case SettingsRequest():
                return [Settings(settings=to_plain(load("", self.settings)))]
            case Hello() if self.refuses:
                return [Refused(reason=self.refuses)]
            case Hello(rank=rank):
                self._ranks[member] = rank
                return [Welcome(store=self.store.path, machine=machine(), version=3)]
            case BatchRequest(step=step):
                parts = [cases.groups(seed=step, version=step + self._base)[i] for i in SPLIT[self._ranks[member]]]
                return [cases.shard_of(parts, problems=4, step=step, version=step + self._base)]
            case Finish():
                return [Stop(reason="finished")]
            case Commit(step=step):
                return [Committed(step=step, status=self._status(step + 1))]
            case Evaluate(version=version):
                return [
                    Evaluated(
                        version=version,
                        pass_auto=version / 8,
                        pass_guided=1.0,
                        problems=4,
                        served_oldest=version,
                        served_newest=version,
                        lag=0.0,
                    )
                ]
            case SnapshotRequest(step=step):
                return [Snapshot(step=step, state=f"hub at {step}".encode())]
            case Restore():
                self._base = 10
                return [Restored(version=12)]
            case StatusRequest():
                return [Status(status=self._status(len(self.of(Commit))))]
        return []

    def _status(self, step: int) -> dict[str, Any]:
        ledger = {"dispatched": 4 * step, "trained": 4 * step, "dropped": {}, "in_flight": 0, "buffered": 0}
        zeros = dict.fromkeys(("tokens_per_s", "tokens_generated", "leases_reissued", "rejected", "duplicates"), 0)
        shares = {"pass_auto": 0.5, "pass_guided": 1.0, "reward_auto": 0.5, "reward_guided": 1.0, "engine_idle": 0.0}
        shares |= {"tokens_dropped": 0.0, "length_bias": 0.0, "pass_bias": 0.0}
        shares |= {"uniform": 0.25, "cut": 0.0, "engine_waits": {"weights": 0.0, "leases": 0.0}, "running": 0}
        shares |= {"canary_mean": None, "canary_max": None, "canary_alarms": {}}
        version = step + self._base
        return {"version": version, "actors": [], "ledger": ledger, "evaluations": [], **zeros, **shares}


def learn(folder: Path, hub: ScriptedHub, *overrides: str) -> tuple[int, str]:
    """Run two ranks to their end; return exit status and stderr."""
    (folder / "run.yaml").write_text(f"name: it\nout: {folder}/runs\n", encoding="utf-8")
    command = ["-m", "sgpo_async.cli", "learner", str(folder / "run.yaml"), "--hub", hub.address]
    settings = [
        "learner.batch_timeout_s=60",
        "evaluation.every=2",
        "hub.heartbeat_s=0.2",
        "optim.lr=1e-2",
        "learner.problems_per_step=4",
    ]
    hub.settings = [word for word in ("name=it", *settings, *overrides) if "learner.resume" not in word]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    errors = folder / "stderr.txt"
    with errors.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*torchrun(2), *command, *settings, *overrides],
            env=environment,
            cwd=folder,
            stderr=file,
            start_new_session=True,
        )
        try:
            status = process.wait(DEADLINE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return status, errors.read_text(encoding="utf-8")


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "runs/it/metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def first(folder: Path) -> Iterator[ScriptedHub]:
    """A run of two steps that finished successfully."""
    hub = ScriptedHub(folder)
    status, errors = learn(folder, hub, "steps=2")
    assert status == 0, errors
    hub.errors = errors
    yield hub
    hub.close()


def test_the_learner_sends_the_messages_of_the_protocol(first: ScriptedHub) -> None:
    assert sorted(hello.rank for hello in first.of(Hello)) == [0, 1]
    assert len({hello.tokenizer for hello in first.of(Hello)}) == 1
    assert sorted(request.step for request in first.of(BatchRequest)) == [0, 0, 1, 1]
    assert [commit.step for commit in first.of(Commit)] == [0, 1]
    assert [published.version for published in first.of(Published)] == [3, 4, 5]
    assert [evaluate.version for evaluate in first.of(Evaluate)] == [3, 5]
    assert len(first.of(Finish)) == 1
    assert len(first.of(Goodbye)) == 2
    assert first.heartbeats > 0


@pytest.mark.usefixtures("first")
def test_the_learner_writes_metrics_and_a_summary(folder: Path) -> None:
    written = lines(folder)
    assert [line["step"] for line in written[:2]] == [1, 2]
    assert written[1]["eval_pass_auto"] == 5 / 8
    assert written[1]["lag_histogram"].keys() == {"0", "1"}
    summary = json.loads((folder / "runs/it/summary.json").read_text(encoding="utf-8"))
    assert {
        "steps",
        "wall_s",
        "world_size",
        "actors",
        "objective",
        "pass_auto_first",
        "pass_auto_last",
    } <= summary.keys()
    assert {"pass_guided_last", "weight_version", "lag_mean", "lag_max", "tokens_generated"} <= summary.keys()
    assert {"tokens_trained", "learner_idle", "engine_idle", "ledger"} <= summary.keys()
    assert summary["pass_auto_first"] == 3 / 8
    assert summary["world_size"] == 2


def test_the_learner_logs_an_alarm_if_engine_and_learner_differ(first: ScriptedHub, folder: Path) -> None:
    """The log-probabilities of these rollouts are random numbers."""
    mismatch = json.loads((folder / "runs/it/summary.json").read_text(encoding="utf-8"))["mismatch"]
    assert mismatch["bound"] == 1e-4  # the default for float32
    assert mismatch["judged"] == mismatch["alarms"] > 0
    logged = [line for line in first.errors.splitlines() if "mismatch alarm" in line]
    assert len(logged) == mismatch["alarms"]  # only rank 0 logs
    assert any(f" learner-0    warning: mismatch alarm: step {mismatch['worst_step']}: " in line for line in logged)
    assert lines(folder)[0]["mismatch_bound"] == 1e-4


def test_store_and_exported_folder_contain_the_last_weights(first: ScriptedHub, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/it/policy")
    assert len(AutoTokenizer.from_pretrained(folder / "runs/it/policy")) > 10
    reader = StoreReader(first.store.path)
    tensors = reader.tensors(5)
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter.detach())


@pytest.mark.usefixtures("first")
def test_the_learner_resumes_from_the_checkpoint(folder: Path) -> None:
    assert (folder / "runs/it/checkpoints/step-00000002").is_dir()
    before = lines(folder)
    rounds = folder / "runs/it/benchmarks"
    for version in (3, 5, 6, 11):  # the version in the checkpoint is 5
        (rounds / str(version)).mkdir(parents=True)
    hub = ScriptedHub(folder)
    try:
        status, errors = learn(folder, hub, "steps=3", "learner.resume=true")
        assert status == 0, errors
        assert [restore.state for restore in hub.of(Restore)] == [b"hub at 2"]
        assert [commit.step for commit in hub.of(Commit)] == [2]
        assert [published.version for published in hub.of(Published)] == [12, 13]
        after = lines(folder)
        assert after[:2] == before[:2]
        assert (after[2]["step"], after[2]["version"]) == (3, 13)
        assert after[2]["tokens_trained"] > before[1]["tokens_trained"]
        assert {path.name for path in rounds.iterdir()} == {"3", "5"}, "the rounds after the checkpoint must be removed"
    finally:
        hub.close()


def test_a_refused_learner_ends_with_a_one_line_error(tmp_path: Path) -> None:
    hub = ScriptedHub(tmp_path, refuses="another tokenizer; use the same model.path")
    try:
        status, errors = learn(tmp_path, hub)
        assert status != 0
        assert "the hub refused the request: another tokenizer; use the same model.path" in errors
        assert "sgpo_async/learner/train.py" not in errors
    finally:
        hub.close()

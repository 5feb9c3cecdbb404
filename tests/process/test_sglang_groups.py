"""Weight-update groups with real SGLang servers: the steps that the docstring of `session.weight_groups` describes."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sgpo_async.engines.sglang.processes.launch import CPU_LAUNCHER, STAND_INS
from sgpo_async.errors import SessionError
from sgpo_async.model.folder import model_folder
from sgpo_async.session import Deadlines, SenderUp, WeightReceiver, WeightSender
from sgpo_async.weights import BroadcastPlan, StoreFile, StoreWriter

pytestmark = [pytest.mark.sglang, pytest.mark.process]

PYTHON = Path(".venv-sglang/bin/python").absolute()
BASE = model_folder("builtin:cues")
START_S = 240.0
PATIENCE_S = 120.0
PHASE_S = 20.0

Weights = dict[str, torch.Tensor]


class Server:
    """A real SGLang server on the CPU, serving the base policy."""

    def __init__(self, log: Path, tp: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.tp, self._log = tp, log
        command = f"{CPU_LAUNCHER} --host 127.0.0.1 --port {self.port} --tp {tp} --device cpu --dtype float32"
        command += " --max-total-tokens 4096 --skip-tokenizer-init --sleep-on-idle"
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": str(STAND_INS),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if tp > 1:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(n) for n in range(tp))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(PYTHON), *command.split(), "--model-path", BASE],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.2)

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def post(self, path: str, timeout_s: float = PATIENCE_S, **body: Any) -> dict[str, Any]:
        """The answer to a POST request. Raises RuntimeError with the server's message if it refuses."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()}") from None

    def checksums(self) -> list[dict[str, str]]:
        """The checksums of all parameters, per rank."""
        return [rank["checksums"] for rank in self.post("weights_checker", action="checksum")["ranks"]]

    def close(self) -> None:
        os.killpg(self._process.pid, 9)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/model_info", timeout=1).read()
        except OSError:
            return False
        return True


class Session:
    """A store, a weight sender and a weight receiver; a thread polls their events, as the actor's loop does."""

    def __init__(self) -> None:
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path)
        self.local = StoreFile("/nowhere")
        self.receiver = WeightReceiver("a-1", store=self.local.path, pulls=False, deadlines=Deadlines(group_s=PHASE_S))
        self.sender = WeightSender(self.file.path, "a-1", "127.0.0.1")
        self.groups = self.receiver.groups
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.sender.stop()
        self.receiver.stop()
        self.file.close()
        self.local.close()

    def _poll(self) -> None:
        while not self._over.wait(0.02):
            for event in self.sender.poll():
                if isinstance(event, SenderUp):
                    self.receiver.connect("127.0.0.1", event.port, event.secret)
            self.receiver.poll()


@pytest.fixture(scope="module", params=[1, 2])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sglang") / "log", request.param)
    yield server
    server.close()


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.close()


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a request in a thread."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def base() -> Weights:
    return safetensors.torch.load_file(Path(BASE) / "model.safetensors")


def folder_of(weights: Weights, at: Path) -> str:
    """A copy of the model folder with other weights."""
    shutil.copytree(BASE, at)
    safetensors.torch.save_file(weights, at / "model.safetensors", metadata={"format": "pt"})
    return str(at)


def form(session: Session, server: Server, group: str, in_background: Callable[..., Future[Any]]) -> None:
    world_size = 1 + server.tp
    host, port = session.groups.open(group, backend="gloo", world_size=world_size).result(PATIENCE_S)
    joining = session.groups.join(group)
    in_background(
        server.post,
        "init_weights_update_group",
        **{"master_address": host, "master_port": port, "rank_offset": 1, "world_size": world_size},
        group_name=group,
        backend="gloo",
    ).result(PATIENCE_S)
    joining.result(PATIENCE_S)


def post_plan(server: Server, group: str, plan: BroadcastPlan) -> None:
    for broadcast in plan.broadcasts:
        server.post(
            "update_weights_from_distributed",
            **asdict(broadcast),
            group_name=group,
            load_format="flattened_bucket",
            flush_cache=broadcast is plan.broadcasts[-1],
        )


def update(session: Session, server: Server, group: str, plan: BroadcastPlan) -> None:
    server.post("begin_weight_update")
    sending = session.groups.broadcast(group, plan)
    post_plan(server, group, plan)
    sending.result(PATIENCE_S)
    server.post("end_weight_update")


def test_a_broadcast_gives_the_same_weights_as_loading_from_disk(
    session: Session, server: Server, in_background: Callable[..., Future[Any]], tmp_path: Path
) -> None:
    seconds: dict[str, float] = {}

    def timed(what: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        result = function(*args)
        seconds[what] = round(time.monotonic() - began, 3)
        return result

    session.writer.publish(0, base().items())
    old = server.checksums()
    timed("session", lambda: session.groups.plan(0).result(PATIENCE_S))
    timed("form", form, session, server, "g", in_background)
    for version in (1, 2):
        new = {name: t * (1.5 + version) for name, t in base().items()}
        session.writer.publish(version, new.items())
        plan = timed("plan", lambda v=version: session.groups.plan(v).result(PATIENCE_S))
        timed(f"update {version}", update, session, server, "g", plan)
        by_group = timed("checksums", server.checksums)
        assert len(by_group) == server.tp
        assert by_group != old
        server.post("update_weights_from_disk", model_path=BASE)
        assert server.checksums() == old
        server.post("update_weights_from_disk", model_path=folder_of(new, tmp_path / str(version)))
        assert server.checksums() == by_group
    print(f"tp={server.tp}", seconds)
    server.post("update_weights_from_disk", model_path=BASE)
    session.groups.close("g")
    server.post("destroy_weights_update_group", group_name="g")


def test_a_waiting_server_gets_an_error_when_rank_0_leaves(
    session: Session, server: Server, in_background: Callable[..., Future[Any]]
) -> None:
    session.writer.publish(0, base().items())
    plan = session.groups.plan(0).result(PATIENCE_S)
    old = server.checksums()
    form(session, server, "left", in_background)
    server.post("begin_weight_update")
    receiving = in_background(post_plan, server, "left", plan)
    time.sleep(1.0)
    assert not receiving.done()
    session.groups.close("left")
    with pytest.raises(RuntimeError, match="Failed to receive weights"):
        receiving.result(PHASE_S)
    server.post("end_weight_update")
    assert server.checksums() == old
    form(session, server, "after", in_background)
    update(session, server, "after", plan)
    assert server.checksums() == old


def test_a_waiting_server_gets_an_error_when_the_weight_sender_dies_before_the_join(
    session: Session, server: Server, in_background: Callable[..., Future[Any]]
) -> None:
    host, port = session.groups.open("dead", backend="gloo", world_size=1 + server.tp).result(PATIENCE_S)
    joining = in_background(
        server.post,
        "init_weights_update_group",
        **{"master_address": host, "master_port": port, "rank_offset": 1, "world_size": 1 + server.tp},
        group_name="dead",
        backend="gloo",
    )
    time.sleep(1.0)
    assert not joining.done()
    session.sender.stop()
    with pytest.raises(RuntimeError, match="Failed to initialize custom process group"):
        joining.result(PHASE_S)
    with pytest.raises(SessionError, match="dead: join"):
        session.groups.join("dead").result(PHASE_S)
    assert server.checksums()  # it still answers

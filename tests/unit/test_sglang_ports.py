"""Launched servers: their ports lie below the system's ephemeral range, a port that was taken is detected, no proxy."""

import asyncio
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.sglang.processes import process
from sgpo_async.engines.sglang.processes.launch import CPU_CACHE, CPU_TOKENS, Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving import texts
from sgpo_async.errors import DeadlineExceeded, EngineError
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import cache_bytes, read_config

WRITES_PID = """
import os, pathlib, time
part = pathlib.Path(FILE + ".part")
part.write_text(str(os.getpid()))
part.rename(FILE)
time.sleep(600)
"""
TAKEN = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use"


@dataclass(frozen=True, kw_only=True)
class ScriptLaunch(Launch):
    """Launches a Python script in place of SGLang; its argument is the port."""

    script: str

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", self.script, str(port)]


def launch(script: str = "import time; time.sleep(600)") -> ScriptLaunch:
    return ScriptLaunch(
        settings=Sglang(), model="m", dtype="float32", device="cpu", slots=1, longest=8, script=script
    )  # fmt: skip


def test_ports_are_free_and_below_the_ephemeral_range(tmp_path: Path) -> None:
    below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    servers = [ServerProcess(launch(), tmp_path / "server.log") for _ in range(8)]
    ports = {int(server.url.rpartition(":")[2]) for server in servers}
    for server in servers:
        server.stop()
    assert len(ports) >= 7  # of 12,000: two may be equal by chance
    assert all(below - process.PORTS <= port < below for port in ports)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.pop()))


def test_a_port_that_was_taken_is_detected_in_the_log_of_this_start_only(tmp_path: Path) -> None:
    log, more = tmp_path / "server.log", tmp_path / "more"
    log.write_bytes(b"an earlier start: address already in use\n")
    script = f"import pathlib, time\nwhile not pathlib.Path({str(more)!r}).exists(): time.sleep(0.01)\n"
    server = ServerProcess(launch(f'{script}print("""{TAKEN}""", flush=True)\ntime.sleep(600)'), log)
    try:
        assert server.alive and not server.port_taken
        more.touch()
        deadline = time.monotonic() + 120
        while not server.port_taken:
            assert server.alive and time.monotonic() < deadline, "the server's line did not reach its log"
            time.sleep(0.01)
    finally:
        server.stop()
    assert not server.alive


def test_a_server_has_stopped_when_all_its_processes_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that takes a while to die holds the memory of its GPU, which the next server needs."""
    pid_file = tmp_path / "pid"
    server = ServerProcess(launch(f"FILE = {str(pid_file)!r}{WRITES_PID}"), tmp_path / "log")
    deadline = time.monotonic() + 120
    while not pid_file.exists():
        assert server.alive and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    scheduler, kill = psutil.Process(int(pid_file.read_text())), os.kill
    monkeypatch.setattr(os, "killpg", kill)  # only the watchdog dies at once
    monkeypatch.setattr(process, "STOP_S", 0.3)
    with pytest.raises(DeadlineExceeded, match=r"server http://127.0.0.1:\d+: no end after SIGKILL within 0.3 s"):
        server.stop()
    monkeypatch.setattr(process, "STOP_S", 60.0)
    later = threading.Timer(0.5, scheduler.kill)
    later.start()
    server.stop()
    assert later.finished.is_set() and (not scheduler.is_running() or scheduler.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_a_server_asks_itself_without_a_proxy(name: str) -> None:
    environment = launch().environment({"HTTP_PROXY": "http://proxy:3128", name: ".host"})
    assert environment["HTTP_PROXY"] == "http://proxy:3128"  # it may download its model
    assert environment["no_proxy"] == environment["NO_PROXY"] == ".host,127.0.0.1,localhost"
    assert launch().environment({})["no_proxy"] == "127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("slots", "longest", "token_bytes", "expected"),
    [
        (4, 512, 400, 4 * 512),  # all sequences fit
        (128, 2_048, 400, CPU_TOKENS),
        (16, 8_192, 46_080, CPU_CACHE // 46_080),  # SmolLM2-135M in float32: CPU_TOKENS would be 6 GB
        (16, 32_768, 114_688, 32_768),  # one sequence of full length always fits
    ],
)
def test_the_cache_of_a_cpu_server_is_limited_in_bytes(
    slots: int, longest: int, token_bytes: int, expected: int
) -> None:
    one = Launch(
        settings=Sglang(), model="m", dtype="float32", device="cpu", slots=slots, longest=longest,
        token_bytes=token_bytes,
    )  # fmt: skip
    command = one.command(1)
    assert command[command.index("--max-total-tokens") + 1] == str(expected)
    assert "--max-total-tokens" not in replace(one, device="cuda").command(1)


def test_a_text_server_is_launched_with_the_lengths_and_sizes_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Launch] = []

    def launch(launch: Launch, _log: Path) -> ServerProcess:
        launched.append(launch)
        raise EngineError("no server is needed here")

    async def run() -> None:
        engine = Engine(kind="sglang", device="cpu", slots=4)
        async with texts.text_server(model, engine, dtype="bfloat16", served_name="m", log=tmp_path / "log"):
            pass

    monkeypatch.setattr(texts, "ServerProcess", launch)
    model = model_folder("builtin:cues")
    config = read_config(model)
    with pytest.raises(EngineError, match="no server is needed here"):
        asyncio.run(run())
    (one,) = launched
    assert one.longest == config.max_position_embeddings
    assert one.token_bytes == cache_bytes(config, dtype=torch.bfloat16)

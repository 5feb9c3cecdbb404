"""Servers that are killed at any moment: every request has one result, and every token has a known version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sglang_support import Servers, assert_teacher_forced, completion, loaded, version_of

from sgpo_async.engines.base import Failed
from sgpo_async.engines.sglang.processes.api import ServerApi
from sgpo_async.engines.sglang.serving.fleet import Fleet
from sgpo_async.errors import EngineError

pytestmark = [pytest.mark.sglang, pytest.mark.process]
REQUESTS = 32
PHASES = (
    "/abort_request",
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/end_weight_update",
    "/weights_checker",
    "/model_info",
)
LONG = ("/begin_weight_update", "/update_weights_from_tensor", "/weights_checker")  # longer than a few ms
MOMENTS = [(phase, 0.0) for phase in PHASES] + [(phase, 0.004) for phase in LONG]  # phase, and seconds after its start


@pytest.fixture(scope="module")
def _victims(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(models["qwen3"], tmp_path_factory.mktemp("logs"), servers=2, transport="tensor") as servers:
        yield servers


@pytest.fixture
def victims(_victims: Servers, models: dict[str, Path]) -> Servers:
    """Two servers with version 0; each test kills the first one."""
    _victims.engine.reset()
    _victims.load(models["qwen3"], 0)
    return _victims


def run_all(servers: Servers) -> list[Any]:
    requests = [completion(i, length=4 + i % 5, tokens=150, seed=i) for i in range(REQUESTS)]
    for request in requests:
        servers.engine.submit(request)
    servers.until(lambda: servers.engine.load_status().running == REQUESTS, "all running")
    return requests


@pytest.mark.parametrize("killed", ["server", "scheduler"])
def test_kill_during_generation(victims: Servers, models: dict[str, Path], killed: str) -> None:
    """Tokens that had arrived are kept; the dead server's requests continue elsewhere; the server restarts."""
    requests = run_all(victims)
    first = victims.engine.server_slots[0]
    lost = first.process
    assert lost is not None and first.server is not None
    victims.until(lambda: any(len(r.item.tokens) > 20 for r in first.server.running.values()), "tokens to keep")  # type: ignore[union-attr]
    members = victims.processes(0)
    scheduler = max(members, key=lambda process: process.memory_info().rss)
    (scheduler if killed == "scheduler" else members[1]).kill()
    results = victims.results(REQUESTS)
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, results)
    victims.until(lambda: victims.versions() == {0} and first.process is not lost, "restarted server")
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    assert any("has ended; the end of" in line for line in victims.events())


@pytest.mark.parametrize(("phase", "after_s"), MOMENTS)
def test_kill_in_each_phase_of_an_update(
    victims: Servers, models: dict[str, Path], phase: str, after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies before an HTTP request is sent, or while it works on it.

    The other server gets the new version and all requests; the dead one restarts with the new version.
    """
    call, killed = ServerApi._call, []

    async def deadly(api: ServerApi, method: str, path: str, body: Any, timeout_s: float, *rest: Any) -> Any:
        if path == phase and api.url == victims.engine.server_slots[0].url and not killed:
            killed.append(path)
            pending = asyncio.create_task(call(api, method, path, body, timeout_s)) if after_s else None
            await asyncio.sleep(after_s)
            victims.kill(0)
            if pending is not None:
                return await pending
        return await call(api, method, path, body, timeout_s, *rest)

    requests = run_all(victims)
    lost = victims.engine.server_slots[0].process
    monkeypatch.setattr(ServerApi, "_call", deadly)
    victims.engine.load(version_of(models["qwen3-other"], 1))
    results = victims.results(REQUESTS)
    # On a busy machine, the other server may finish everything before the first one reaches the phase.
    victims.until(lambda: killed, "kill")
    assert_teacher_forced({0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}, requests, results)
    victims.until(lambda: victims.versions() == {1}, "version 1 on both")
    assert victims.engine.server_slots[0].process is not lost


def test_a_request_that_kills_servers_fails_and_the_others_finish(victims: Servers, models: dict[str, Path]) -> None:
    """A token id beyond the vocabulary kills a server. `submit` would refuse it, so the test bypasses `submit`."""
    requests = run_all(victims)
    killer = replace(completion("killer"), prompt=np.array([10**6], np.int32))
    victims.engine._call(Fleet.submit, killer)
    results = victims.results(REQUESTS + 1, seconds=240.0)
    failed = results.pop("killer")
    assert isinstance(failed, Failed)
    assert str(failed.error).startswith(
        "request killer: 3 servers died while it ran on them, the last one with nothing"
    )
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, results)
    victims.until(lambda: victims.versions() == {0}, "restarted servers")


def test_a_suspended_server_is_restarted_after_the_timeout(models: dict[str, Path], tmp_path: Path) -> None:
    """After SIGSTOP it keeps its connections but sends nothing. Its requests move to the other server."""
    with Servers(models["qwen3"], tmp_path, servers=2, phase_timeout_s=3.0) as servers:
        servers.load(models["qwen3"], 0)
        requests = run_all(servers)
        for process in servers.processes(0)[1:]:
            process.suspend()
        servers.engine.load(version_of(models["qwen3-other"], 1))
        results = servers.results(REQUESTS)
        assert_teacher_forced({0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}, requests, results)
        servers.until(lambda: servers.versions() == {1}, "version 1 on both")
        assert any("no answer within 3 s" in line for line in servers.events()), servers.events()


def test_the_error_of_a_server_that_cannot_start_contains_the_end_of_its_log(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with (
        pytest.raises(EngineError, match="has ended; the end of") as error,
        Servers(models["qwen3"], tmp_path, args="--no-such-option"),
    ):
        raise AssertionError("started")
    assert "unrecognized arguments: --no-such-option" in str(error.value)


def test_servers_do_not_outlive_their_actor(models: dict[str, Path], tmp_path: Path) -> None:
    """The actor's end of the pipe to the watchdog closes, as happens when the actor is killed."""
    servers = Servers(models["qwen3"], tmp_path)
    with servers:
        members = servers.processes(0)
        process = servers.engine.server_slots[0].process
        assert process is not None and process._watchdog.stdin is not None
        process._watchdog.stdin.close()
        _, alive = psutil.wait_procs(members, timeout=120)
        assert not alive, alive

"""Broadcasts from a real weight sender through the engine: updates in flight, and deaths of servers and sender."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang_support import Servers, assert_teacher_forced, completion, loaded, version_of
from test_sglang_groups import Session

from sgpo_async.engines import Weights
from sgpo_async.engines.sglang.processes.api import ServerApi

pytestmark = [pytest.mark.sglang, pytest.mark.process]
REQUESTS = 32
PHASES = ("/update_weights_from_distributed", "/end_weight_update", "/init_weights_update_group")


class Broadcasting:
    """Two servers, and a session whose weight sender reads the learner's store."""

    def __init__(self, servers: Servers, models: dict[str, Path]) -> None:
        self.servers, self.models = servers, models
        self.session = Session()
        self.of_version: dict[int, Path] = {}
        self.sizes: list[int] = []  # ranks of each group
        self.sent: list[str] = []  # the group of each broadcast
        self._versions = itertools.count()
        groups = self.session.groups
        open_group, broadcast = groups.open, groups.broadcast

        def counted_open(group: str, *, backend: str, world_size: int) -> Any:
            self.sizes.append(world_size)
            return open_group(group, backend=backend, world_size=world_size)

        def counted_broadcast(group: str, plan: Any) -> Any:
            self.sent.append(group)
            return broadcast(group, plan)

        groups.open, groups.broadcast = counted_open, counted_broadcast  # type: ignore[method-assign]

    def publish(self, kind: str) -> int:
        """Publish a model's weights, and let the servers load them."""
        version = next(self._versions)
        self.of_version[version] = self.models[kind]
        tensors = dict(version_of(self.models[kind], version).read())
        manifest = self.session.writer.publish(version, tensors.items())
        groups = self.session.groups
        self.servers.engine.load(Weights(version=version, digest=manifest.digest, read=tensors.copy, groups=groups))
        return version

    def wait_for_version(self, version: int) -> None:
        """Wait until both servers have the version."""
        self.servers.until(lambda: self.servers.versions() == {version}, f"version {version} on both")

    def run_all(self) -> list[Any]:
        requests = [completion(i, length=4 + i % 5, tokens=300, seed=i) for i in range(REQUESTS)]
        for request in requests:
            self.servers.engine.submit(request)
        self.servers.until(lambda: self.servers.engine.load_status().running == REQUESTS, "all running")
        return requests

    def assert_results(self, requests: list[Any]) -> None:
        """Wait for all results, and compare their log-probabilities with those of the published models."""
        results = self.servers.results(REQUESTS)
        seen = {version for result in results.values() for version in result.versions.tolist()}
        assert_teacher_forced({version: loaded(self.of_version[version]) for version in seen}, requests, results)


@pytest.fixture(scope="module")
def broadcasting(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broadcasting]:
    with Servers(models["qwen3"], tmp_path_factory.mktemp("logs"), servers=2, transport="distributed") as servers:
        broadcasting = Broadcasting(servers, models)
        yield broadcasting
        broadcasting.session.close()


def test_running_completions_continue_across_a_broadcast(broadcasting: Broadcasting) -> None:
    broadcasting.wait_for_version(broadcasting.publish("qwen3"))
    requests = broadcasting.run_all()
    version = broadcasting.publish("qwen3-other")
    broadcasting.assert_results(requests)
    broadcasting.wait_for_version(version)
    assert {update.transport for update in broadcasting.servers.engine.updates} == {"distributed"}
    assert not broadcasting.servers.events()
    assert broadcasting.sizes == [3]  # the weight sender and both servers
    assert len(broadcasting.sent) == 2 and len(set(broadcasting.sent)) == 1  # one copy of each version


@pytest.mark.parametrize(
    "phase", ["/update_weights_from_distributed", "/end_weight_update", "/init_weights_update_group"]
)
def test_a_server_that_dies_in_a_broadcast_does_not_affect_the_other(
    broadcasting: Broadcasting, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other server gets the version in a group of its own; the dead one restarts and gets it in another one."""
    servers, call, killed = broadcasting.servers, ServerApi._call, []

    async def deadly(api: ServerApi, method: str, path: str, body: Any, timeout_s: float, *rest: Any) -> Any:
        if path == phase and api.url == servers.engine.server_slots[0].url and not killed:
            killed.append(path)
            servers.kill(0)
        return await call(api, method, path, body, timeout_s, *rest)

    broadcasting.wait_for_version(broadcasting.publish("qwen3"))
    requests = broadcasting.run_all()
    monkeypatch.setattr(ServerApi, "_call", deadly)
    if phase == "/init_weights_update_group":
        servers.kill(0)  # only a restarted server joins a new group
    version = broadcasting.publish("qwen3-other")
    broadcasting.assert_results(requests)
    broadcasting.wait_for_version(version)
    assert killed
    broadcasting.wait_for_version(broadcasting.publish("qwen3"))
    assert broadcasting.sizes[-1] == 3  # together again
    assert {update.transport for update in servers.engine.updates} == {"distributed"}


def test_without_a_weight_sender_weights_are_sent_by_another_transport(broadcasting: Broadcasting) -> None:
    """The weight sender dies during a session: the actor loads the versions that it can still read over HTTP."""
    broadcasting.wait_for_version(broadcasting.publish("qwen3"))
    broadcasting.session.sender.stop()
    requests = broadcasting.run_all()
    version = broadcasting.publish("qwen3-other")
    broadcasting.assert_results(requests)
    broadcasting.wait_for_version(version)
    assert {update.transport for update in broadcasting.servers.engine.updates[-2:]} == {"tensor"}

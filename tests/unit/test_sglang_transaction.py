"""Updates as transactions: one server after another, back after a failure in any phase, nothing unverified released."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fake_sglang import SLOTS, StreamingApi, logprob_at, offer_of
from fake_sglang import FakeTransport as Fake

from sgpo_async.engines.base import Generate, Generated, Score, Weights
from sgpo_async.engines.sglang.processes.api import Json, ServerGone, ServerRefused, ServerSilent
from sgpo_async.engines.sglang.serving import fleet as fleet_module
from sgpo_async.engines.sglang.serving.fleet import Fleet, FleetSettings
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.server_slot import ServerSlot
from sgpo_async.engines.sglang.serving.update import InFlight, update
from sgpo_async.engines.sglang.weight_sync import layout
from sgpo_async.engines.sglang.weight_sync.layout import FAMILIES, pieces_of
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport
from sgpo_async.errors import EngineError, SessionError, WeightsError

PHASE_S = 20.0


def generate(id: Any, tokens: int = 6) -> Generate:
    return Generate(id=id, prompt=np.arange(3, dtype=np.int32), max_new_tokens=tokens, temperature=1.0, seed=0)


class PlayedApi(StreamingApi):
    """A server whose checksum is its version. `fails` has the error of the next request to a path."""

    def __init__(self, url: str = "server") -> None:
        super().__init__(url)
        self.fails: dict[str, list[Exception]] = {}
        self.paths: list[str] = []
        self.checking: asyncio.Event | None = None  # a request for checksums waits for it
        self.mute = 0  # so many requests for checksums are answered without any

    async def post(self, path: str, body: Any, *, timeout_s: float, **rest: Any) -> Json:
        self.paths.append(path)
        if self.fails.get(path):
            raise self.fails[path].pop(0)
        if path == "/generate":
            await asyncio.sleep(0)
            meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": [None, [-float(self.version)]]}
            return {"meta_info": meta}
        if path == "/weights_checker":
            if self.checking is not None:
                await self.checking.wait()
            if self.mute:
                self.mute -= 1
                return {"success": False, "message": "busy"}
            ranks = [{"checksums": {"a": str(self.version)}, "parallelism_info": [{"tp_rank": 0}]}]
            return {"success": True, "ranks": ranks}
        return await super().post(path, body, timeout_s=timeout_s, **rest)


class PlayedTransport(Fake):
    """Loads a version into a played server; what it prepares and releases is counted."""

    def __init__(self, name: str = "disk") -> None:
        super().__init__()
        self.name, self.kept, self.sends = name, list[int](), list[tuple[str, int]]()

    def prepare(self, weights: Weights) -> Prepared:
        self.kept.append(weights.version)
        return Prepared(weights.version, weights.digest, [{"a": str(weights.version)}], None)

    async def send(self, api: Any, prepared: Any, *, flush: bool, timeout_s: float) -> None:
        await api.post("/load", {}, timeout_s=timeout_s)
        api.version = prepared.version
        self.sends.append((api.url, prepared.version))
        self.on_send()

    def release(self, prepared: Any) -> None:
        self.kept.remove(prepared.version)


def server_of(api: PlayedApi) -> Server:
    server = Server(cast(Any, api), slots=SLOTS, ends=(), idle_timeout_s=PHASE_S)
    server.version, server.digests, server.open = api.version, {api.version: 0}, True
    return server


async def until(holds: Callable[[], object], event: str = "") -> None:
    deadline = asyncio.get_running_loop().time() + 120
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, f"did not happen: {event}"
        await asyncio.sleep(0.001)


# -- one server -----------------------------------------------------------------------------------------------------

FAILURES = {
    "load refused": ("/load", ServerRefused("no such folder"), ["abort-resume", "retract", "in-place"]),
    "broadcast broken": ("/load", SessionError("the group is broken"), ["abort-resume", "retract", "in-place"]),
    "checksums refused": ("/weights_checker", ServerRefused("busy"), ["abort-resume", "retract", "in-place"]),
    "not resumed": ("/continue_generation", ServerRefused("busy"), ["retract", "in-place"]),
    "not paused": ("/pause_generation", ServerRefused("busy"), ["retract", "in-place"]),
}
CASES = [(name, in_flight) for name, (_, _, policies) in FAILURES.items() for in_flight in policies]


@pytest.mark.parametrize(("failure", "in_flight"), CASES)
def test_after_a_failure_in_any_phase_the_server_serves_the_previous_version(failure: str, in_flight: InFlight) -> None:
    async def scenario() -> None:
        api, transport = PlayedApi(), PlayedTransport()
        server = server_of(api)
        requests = Requests(lambda: [server], ends=())
        api.holds = lambda tokens: len(tokens) == 3 and api.version == 0 and "/load" not in api.paths
        requests.submit(generate("running"))
        await until(lambda: any(len(cast(Any, one.item).tokens) == 3 for one in server.running.values()))
        path, error, _ = FAILURES[failure]
        api.fails[path] = [error]
        with pytest.raises(type(error), match=str(error)):
            await update(
                server, offer_of(1, transport), in_flight=in_flight, phase_s=PHASE_S,
                previous=offer_of(0, transport), on_open=requests.dispatch,
            )  # fmt: skip
        assert (server.version, server.open, server.trial, api.version) == (0, True, None, 0)
        assert transport.sends[-1] == ("server", 0) and api.paths[-1] == "/weights_checker"  # it was verified again
        requests.dispatch()
        await until(lambda: not requests.results.empty(), "the result")
        result = requests.results.get()
        assert isinstance(result, Generated) and result.versions.tolist() == [0]
        assert result.logprobs.tolist() == [logprob_at(3 + i, 0) for i in range(6)]

    asyncio.run(scenario())


def test_a_server_that_answers_without_checksums_goes_back_to_the_previous_version() -> None:
    async def scenario() -> None:
        api, transport = PlayedApi(), PlayedTransport()
        server, api.mute = server_of(api), 1
        with pytest.raises(ServerRefused, match="gave no checksums: busy"):
            await update(
                server, offer_of(1, transport), in_flight="abort-resume", phase_s=PHASE_S,
                previous=offer_of(0, transport),
            )  # fmt: skip
        assert (server.version, server.open, api.version) == (0, True, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("back", [ServerRefused("gone too"), WeightsError("damaged"), ServerGone("no answer")])
def test_a_server_that_cannot_go_back_is_shut(back: Exception) -> None:
    async def scenario() -> None:
        api, transport = PlayedApi(), PlayedTransport()
        server = server_of(api)
        api.fails["/load"] = [ServerRefused("first"), back]
        with pytest.raises(ServerRefused, match="first"):
            await update(
                server, offer_of(1, transport), in_flight="abort-resume", phase_s=PHASE_S,
                previous=offer_of(0, transport),
            )  # fmt: skip
        assert (server.version, server.open) == (None, False)
        assert (server.fault is back) == isinstance(back, ServerGone)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/load", "/weights_checker"])
def test_a_server_that_is_too_slow_is_restarted_and_the_error_names_the_setting(path: str) -> None:
    async def scenario() -> None:
        api, transport = PlayedApi(), PlayedTransport()
        server = server_of(api)
        api.fails[path] = [ServerSilent(f"server{path}: no answer within 20 s")]
        with pytest.raises(ServerGone) as failure:
            await update(
                server,
                offer_of(1, transport),
                in_flight="abort-resume",
                phase_s=PHASE_S,
                previous=offer_of(0, transport),
            )
        assert str(failure.value) == (
            f"server{path}: no answer within 20 s; raise engine.sglang.phase_timeout_s if the model is large"
        )
        assert str(server.fault) == str(failure.value)

    asyncio.run(scenario())


@pytest.mark.parametrize("passes", [True, False])
def test_nothing_of_a_version_on_trial_is_released_before_it_is_verified(passes: bool) -> None:
    """Neither results nor progress; after a failure what was sampled is sampled again by the previous version."""

    async def scenario() -> None:
        api, transport = PlayedApi(), PlayedTransport()
        server, opened = server_of(api), asyncio.Event()
        requests = Requests(lambda: [server], ends=())
        api.holds = lambda tokens: len(tokens) == 3 and ("/load" not in api.paths or api.version == 1)
        for id in ("running", "short"):
            requests.submit(generate(id, tokens=8 if id == "running" else 5))
        requests.submit(
            Score(id="score", prompt=np.arange(3, dtype=np.int32), tokens=np.ones(1, np.int32), temperature=1.0)
        )
        await until(lambda: requests.results.qsize() == 1)
        assert requests.results.get().version == 0  # type: ignore[union-attr]
        await until(lambda: {len(cast(Any, one.item).tokens) for one in server.running.values()} == {3})
        api.checking = asyncio.Event()

        def on_open() -> None:
            opened.set()
            requests.dispatch()

        updating = asyncio.create_task(
            update(
                server, offer_of(1, transport), in_flight="abort-resume", phase_s=PHASE_S,
                previous=offer_of(0, transport), on_open=on_open,
            )
        )  # fmt: skip
        await opened.wait()
        assert (server.version, server.generates, server.open) == (0, 1, True)
        requests.submit(
            Score(id="later", prompt=np.arange(3, dtype=np.int32), tokens=np.ones(1, np.int32), temperature=1.0)
        )
        await until(lambda: api.paths.count("/generate") == 2, "the score was computed on trial")
        await until(
            lambda: {5, 6} <= {len(cast(Any, one.item).tokens) for one in server.running.values()},
            "tokens of both on trial",
        )
        for _ in range(20):
            await asyncio.sleep(0)
        assert requests.results.empty() and requests.progress(["running", "short"]) == {}
        if not passes:
            api.version = -1  # its checksums are not those of version 1
        api.checking.set()
        if passes:
            await updating
        else:
            with pytest.raises(WeightsError, match="differ from what was sent"):
                await updating
            requests.dispatch()
        api.holds = lambda tokens: False
        await until(lambda: requests.results.qsize() == 3, "all results")
        assert server.version == int(passes)
        results = {one.id: one for one in (requests.results.get() for _ in range(3))}
        assert results["later"].version == int(passes)  # type: ignore[union-attr]
        for id, count in (("running", 8), ("short", 5)):
            result = results[id]
            assert isinstance(result, Generated) and result.tokens.size == count
            versions = [0] * 3 + [int(passes)] * (count - 3)
            assert np.repeat(result.versions, np.diff(result.ends, prepend=0)).tolist() == versions
            assert result.logprobs.tolist() == [logprob_at(3 + i, version) for i, version in enumerate(versions)]

    asyncio.run(scenario())


def test_a_new_session_is_not_served_by_a_version_on_trial() -> None:
    async def scenario() -> None:
        for moment in ("/load", "/weights_checker"):
            api, transport = PlayedApi(), PlayedTransport()
            server = server_of(api)
            requests = Requests(lambda server=server: [server], ends=())  # type: ignore[misc]
            if moment == "/load":
                transport.on_send = server.forget
            else:
                api.checking = asyncio.Event()
            updating = asyncio.create_task(
                update(
                    server, offer_of(1, transport), in_flight="abort-resume", phase_s=PHASE_S, on_open=requests.dispatch
                )
            )
            await until(lambda api=api: "/weights_checker" in api.paths)  # type: ignore[misc]
            if api.checking is not None:
                server.forget()
                api.checking.set()
            requests.submit(generate("new"))
            await updating
            assert (server.version, server.open, len(server.running)) == (None, False, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
@pytest.mark.parametrize("layers", [1, 2, 30, 112])
def test_the_pieces_of_a_verification_are_all_parameters_each_once(architecture: str, layers: int) -> None:
    config = dict(
        architectures=[architecture], vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    names = layout.layout_of(config, tp=2, device="cpu")
    expected = [{name: f"{rank} {name}" for name in names} for rank in range(2)]
    pieces = pieces_of(expected)
    assert 1 < len(pieces) <= layout.PIECES
    for rank in range(2):
        assert [name for piece in pieces for name in piece.expected[rank]] != []
        assert sum(len(piece.expected[rank]) for piece in pieces) == len(names)
        for piece in pieces:  # as the server does it
            left = {
                name: one for name, one in expected[rank].items() if not any(other in name for other in piece.others)
            }
            assert left == piece.expected[rank]


def test_a_request_waits_for_a_server_with_the_version_that_it_needs() -> None:
    """The only server with version 1 has died; the hub would refuse tokens of version 0."""

    async def scenario() -> None:
        servers = [server_of(PlayedApi(f"server {index}")) for index in range(2)]
        new, old = servers
        new.version, new.digests = 1, {1: 0}
        cast(PlayedApi, new.api).version = 1
        requests = Requests(lambda: servers, ends=())
        cast(PlayedApi, new.api).holds = lambda tokens: len(tokens) == 3
        requests.submit(replace(generate("strict"), min_version=1))
        await until(lambda: any(len(cast(Any, one.item).tokens) == 3 for one in new.running.values()))
        new.fault = ServerGone("died")
        await new.cancel_streams()
        requests.submit(generate("any"))
        await until(lambda: not requests.results.empty(), "the result of the request that any version may serve")
        assert requests.results.get().id == "any" and requests.waiting == 1  # type: ignore[union-attr]
        old.version, old.digests = 1, {1: 0}
        cast(PlayedApi, old.api).version = 1
        requests.dispatch()
        await until(lambda: not requests.results.empty(), "the other result")
        result = requests.results.get()
        assert isinstance(result, Generated) and result.versions.tolist() == [1]

    asyncio.run(scenario())


# -- a fleet --------------------------------------------------------------------------------------------------------


class Played:
    """A fleet of played servers; `updating` has how many servers are being updated, and `most` the largest number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *transports: PlayedTransport, servers: int = 3) -> None:
        self.apis = [PlayedApi(f"server {index}") for index in range(servers)]
        self.slots = [ServerSlot(launch=None, url=api.url, log=None) for api in self.apis]
        by_url = {api.url: api for api in self.apis}
        self.starts: list[str] = []

        async def nothing(*_: Any, **__: Any) -> list[str]:
            return []

        def start(api: Any, **_: Any) -> Server:
            self.starts.append(api.url)
            return Server(cast(Any, by_url[api.url]), slots=SLOTS, ends=(), idle_timeout_s=PHASE_S)

        monkeypatch.setattr(fleet_module, "Server", start)
        for name in ("wait_until_ready", "clean_up_attached"):
            monkeypatch.setattr(fleet_module, name, nothing)
        monkeypatch.setattr(fleet_module, "RETRY_S", 0.01)
        monkeypatch.setattr(fleet_module, "BACKOFF_S", (0.01,))
        settings = FleetSettings(slots=4, ends=frozenset(), in_flight="abort-resume", start_s=1.0, phase_s=PHASE_S)
        self.fleet = Fleet(self.slots, settings, [cast(Transport, one) for one in transports], nothing)
        self.task = asyncio.create_task(self.fleet.run())

    def want(self, version: int) -> None:
        self.fleet.want(cast(Weights, SimpleNamespace(version=version, digest="00" * 16)))

    def versions(self) -> list[int | None]:
        return [slot.server.version if slot.server and slot.server.open else None for slot in self.slots]

    async def all_have(self, version: int) -> None:
        await until(lambda: self.versions() == [version] * len(self.slots), f"version {version}: {self.events()}")

    def events(self) -> list[str]:
        lines = []
        while True:
            try:
                lines.append(self.fleet.events.get_nowait())
            except queue.Empty:
                return lines

    async def close(self) -> None:
        self.fleet.close()
        await self.task


def test_servers_take_turns_after_their_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        transport = PlayedTransport()
        played = Played(monkeypatch, transport)
        most = 0

        def in_update() -> int:
            return sum(slot.loading is not None for slot in played.slots)

        def count() -> None:
            nonlocal most
            most = max(most, in_update())

        transport.on_send = count
        for api in played.apis:  # all of them load at the same time before one is verified
            api.checking = asyncio.Event()
        played.want(0)
        await until(lambda: in_update() == 3, "three first loads at the same time")
        for api in played.apis:
            assert api.checking is not None
            api.checking.set()
        await played.all_have(0)
        most = 0
        for version in (1, 2):
            played.want(version)
            await played.all_have(version)
        assert most == 1 and transport.sends[3:6] != transport.sends[6:9]
        await until(lambda: transport.kept == [2], "older versions were released")
        await played.close()

    asyncio.run(scenario())


def test_a_newer_version_in_the_middle_is_what_the_other_servers_load_and_all_end_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        transport = PlayedTransport()
        played = Played(monkeypatch, transport)
        played.want(0)
        await played.all_have(0)

        def newer() -> None:
            if transport.sends[-1][1] == 1 and len(transport.sends) == 4:
                played.want(2)

        transport.on_send = newer
        played.want(1)
        await played.all_have(2)
        loaded = [version for _, version in transport.sends[3:]]
        assert loaded[0] == 1 and loaded.count(2) == 3 and set(loaded) == {1, 2}
        await until(lambda: transport.kept == [2], "older versions were released")
        await played.close()

    asyncio.run(scenario())


def test_no_server_is_left_out_while_versions_keep_arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is always a newer version before a server is done."""

    async def scenario() -> None:
        transport = PlayedTransport()
        played = Played(monkeypatch, transport)
        played.want(0)
        await played.all_have(0)
        version = 0

        def newer() -> None:
            nonlocal version
            if version < 30:
                version += 1
                played.want(version)

        transport.on_send = newer
        newer()
        await until(lambda: version == 30, "30 versions")
        await played.all_have(30)
        order = [url for url, _ in transport.sends[3:]]
        for start in range(len(order) - 5):  # a server that has the newest version already lets the others go first
            assert set(order[start : start + 6]) == {api.url for api in played.apis}, order
        assert [number for _, number in transport.sends[3:]] == sorted(number for _, number in transport.sends[3:])
        await until(lambda: transport.kept == [30], "older versions were released")
        await played.close()

    asyncio.run(scenario())


def test_a_version_that_a_server_refuses_is_loaded_by_the_next_transport_and_the_server_serves_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        disk, tensor = PlayedTransport("disk"), PlayedTransport("tensor")
        played = Played(monkeypatch, disk, tensor, servers=2)
        played.want(0)
        await played.all_have(0)
        played.events()
        played.apis[0].fails["/load"] = [ServerRefused("no such folder")]
        played.want(1)
        await played.all_have(1)
        assert disk.sends[2:] == [("server 0", 0), ("server 1", 1)] and tensor.sends == [("server 0", 1)]
        assert played.events() == ["version 1 by disk: no such folder; version 0 is in service on server 0"]
        assert played.starts == ["server 0", "server 1"]
        played.want(2)  # by disk, although the server has the version before by another transport
        await played.all_have(2)
        await until(lambda: (disk.kept, tensor.kept) == ([2], []), "older versions were released")
        await played.close()

    asyncio.run(scenario())


def test_a_version_that_no_transport_can_load_leaves_the_previous_one_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        transport = PlayedTransport()
        played = Played(monkeypatch, transport, servers=1)
        played.want(0)
        await played.all_have(0)
        played.events()
        played.apis[0].fails["/weights_checker"] = [ServerRefused("once")]
        played.want(1)
        await played.all_have(1)
        assert played.events() == [
            "version 1 by disk: once; version 0 is in service on server 0",
            "server 0: version 1 cannot be loaded: by disk: once; next try in 0.01 s",
        ]
        assert [version for _, version in transport.sends] == [0, 1, 0, 1] and played.starts == ["server 0"]
        await played.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [ServerRefused("refused"), ServerGone("no answer")])
def test_a_server_that_cannot_go_back_is_restarted(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        played = Played(monkeypatch, PlayedTransport(), servers=2)
        played.want(0)
        await played.all_have(0)
        played.apis[0].fails["/load"] = [ServerRefused("first"), error]
        played.want(1)
        await played.all_have(1)
        assert played.starts == ["server 0", "server 1", "server 0"], played.events()
        await played.close()

    asyncio.run(scenario())


def test_a_server_that_dies_while_it_waits_for_its_turn_is_restarted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        played = Played(monkeypatch, PlayedTransport(), servers=2)
        played.want(0)
        await played.all_have(0)
        for api in played.apis:
            api.checking = asyncio.Event()
        played.want(1)
        await until(lambda: any(slot.loading for slot in played.slots), "an update")
        (waiting,) = [slot for slot in played.slots if slot.loading is None]
        assert waiting.server is not None
        waiting.server.fault = EngineError("died")
        await until(lambda: played.starts[2:] == [waiting.url], "a restart during the update of the other server")
        for api in played.apis:
            assert api.checking is not None
            api.checking.set()
        await played.all_have(1)
        await played.close()

    asyncio.run(scenario())


def test_the_health_of_a_server_is_also_checked_if_the_canary_is_scored_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "CHECK_INTERVAL_S", 0.5)
        played = Played(monkeypatch, PlayedTransport(), servers=1)
        tokens = np.ones(1, np.int32)
        played.fleet.watch(Score(id="canary", prompt=np.arange(3, dtype=np.int32), tokens=tokens, temperature=1), 0.1)
        played.want(0)
        await played.all_have(0)
        await until(lambda: played.fleet.canaries.qsize() >= 2, "two scores")
        played.fleet.want(None)
        assert played.fleet.canaries.empty(), "a new session may be of another run"
        played.want(0)
        await played.all_have(0)
        played.apis[0].version = 9
        await until(lambda: len(played.starts) == 2, "a restart, because another program has updated the server")
        assert "the server reports weight version 9, but this actor loaded 0" in " ".join(played.events())
        await played.close()

    asyncio.run(scenario())


def test_both_servers_on_either_side_of_an_update_get_requests_and_the_engine_reports_the_verified_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        played = Played(monkeypatch, PlayedTransport(), servers=2)
        played.want(0)
        await played.all_have(0)
        for api in played.apis:
            api.checking, api.holds = asyncio.Event(), lambda tokens: True
        played.want(1)
        await until(lambda: any(slot.server and slot.server.trial for slot in played.slots), "a trial")
        for id in range(4):
            played.fleet.submit(generate(id))
        servers = [slot.server for slot in played.slots]
        assert [len(server.running) for server in servers if server] == [2, 2] and played.fleet.version() == 0
        for api in played.apis:
            assert api.checking is not None
            api.checking.set()
            api.holds = lambda tokens: False
        await played.all_have(1)
        await until(lambda: played.fleet.results.qsize() == 4, "all results")
        await played.close()

    asyncio.run(scenario())

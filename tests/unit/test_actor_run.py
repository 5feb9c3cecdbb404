"""An actor's life from run to run, and the options of its node."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import pytest

from sgpo_async.actor import run as actor_run
from sgpo_async.actor.run import Actor, ActorOptions
from sgpo_async.cli.main import main
from sgpo_async.config import to_plain
from sgpo_async.config.schema import Engine, Hub, Run, Sglang
from sgpo_async.errors import DeadlineExceeded, EngineError, Refusal, SessionError
from sgpo_async.transport import Mailbox, MemoryRouter


class Scripted(Actor):
    """Serves runs with these outcomes: True, the run is over; False, the hub belongs to another run; or a refusal."""

    def __init__(self, outcomes: Iterable[bool | Refusal]) -> None:
        super().__init__(ActorOptions(hub="memory", name="a"))
        self.outcomes = list(outcomes)

    def _serve(self, mailbox: Mailbox) -> bool:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_run, "Dealer", lambda *_, **__: MemoryRouter().dealer(b"a"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_it_serves_one_run_after_another_until_one_is_over() -> None:
    actor = Scripted([False, False, True])
    assert actor.run() == 0
    assert not actor.outcomes


def test_a_refusal_ends_it() -> None:
    with pytest.raises(Refusal, match="tokenizer"):
        Scripted([False, Refusal("tokenizer", final=True), True]).run()


@pytest.mark.parametrize("megabytes", [16, 4096])
def test_its_messages_may_be_as_large_as_the_hub_accepts(monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    settings = to_plain(Run(hub=Hub(max_message_mb=megabytes)))
    monkeypatch.setattr(actor_run, "request_settings", lambda *_, **__: settings)

    def end(*_: object) -> None:
        raise Refusal("seen enough", final=True)

    monkeypatch.setattr(Actor, "_start_node", end)
    mailbox = Mailbox(MemoryRouter().dealer(b"a"))
    with pytest.raises(Refusal, match="seen enough"):
        Actor(ActorOptions(hub="memory"))._serve(mailbox)
    assert mailbox.dealer.max_bytes == megabytes * 2**20


def test_a_node_without_processes_left_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(actor_run, "WeightReceiver", fail)
    monkeypatch.setattr(actor_run, "request_settings", lambda *_, **__: to_plain(Run()))
    with pytest.raises(SessionError, match="^a: cannot start a weight receiver: .*unavailable; free memory, or raise"):
        Actor(ActorOptions(hub="memory", name="a"))._serve(Mailbox(MemoryRouter().dealer(b"a")))


def test_the_error_of_an_engine_is_told_although_the_weight_receiver_ends_late(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late:
        def stop(self) -> None:
            raise DeadlineExceeded("weight receiver of a", "end after SIGKILL", 5.0)

    def fail(*_: object) -> None:
        raise EngineError("the model cannot be served")

    monkeypatch.setattr(actor_run, "request_settings", lambda *_, **__: to_plain(Run()))
    monkeypatch.setattr(Actor, "_start_node", lambda *_: Late())
    monkeypatch.setattr(Actor, "_warm", fail)
    with pytest.raises(EngineError, match="the model cannot be served"):
        Actor(ActorOptions(hub="memory"))._serve(Mailbox(MemoryRouter().dealer(b"a")))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, Sglang(servers=3, tp=2)),
        ({"servers": 1, "tp": 8}, Sglang(servers=1, tp=8)),
        ({"tp": 4}, Sglang(servers=3, tp=4)),
        ({"sglang_urls": ("http://a:1",)}, Sglang(servers=3, tp=2, urls=["http://a:1"])),
    ],
)
def test_a_node_has_its_own_servers(own: dict[str, Any], expected: Sglang) -> None:
    run = Run(engine=Engine(kind="sglang", slots=9, sglang=Sglang(servers=3, tp=2)))
    node = Actor(ActorOptions(hub="memory", **own))._with_own_options(run)
    assert node.engine == Engine(kind="sglang", slots=9, sglang=expected)


def test_a_node_that_launches_servers_does_not_attach_to_those_of_the_run() -> None:
    run = Run(engine=Engine(kind="sglang", sglang=Sglang(urls=["http://a:1"], tp=2)))
    node = Actor(ActorOptions(hub="memory", servers=2))._with_own_options(run)
    assert node.engine.sglang == Sglang(servers=2, tp=2)


def test_the_command_line_reaches_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ActorOptions] = []
    monkeypatch.setattr(actor_run, "Actor", lambda options: given.append(options) or Scripted([True]))
    assert main(["actor", "--hub", "tcp://127.0.0.1:1", "--slots", "5", "--servers", "2", "--tp", "4"]) == 0
    (options,) = given
    assert options == ActorOptions(hub="tcp://127.0.0.1:1", name=options.name, slots=5, servers=2, tp=4)
    assert options.name.startswith("actor-") and options.name != ActorOptions(hub="x").name


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--servers", "-1"], "--servers must be >= 0"),
        (["--tp", "-1"], "--tp must be >= 0"),
        (["--servers", "1", "--sglang-url", "http://a:1"], "--servers must not be given with --sglang-url"),
    ],
)
def test_options_that_make_no_sense_end_the_command(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["actor", "--hub", "tcp://127.0.0.1:1", *words]) == 2
    assert error in capsys.readouterr().err

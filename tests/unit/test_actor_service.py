"""What an actor does with a request that fails while it is served: the whole lease goes back, for good."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sgpo_async.actor.service import Service
from sgpo_async.config import Run
from sgpo_async.engines.base import EngineLoad, Failed, Generated
from sgpo_async.errors import EngineError
from sgpo_async.wire.records import Lease, Ready, Release


class PlayedEngine:
    """Answers with what it is told to."""

    version = 0

    def __init__(self) -> None:
        self.submitted: list[Any] = []
        self.cancelled: list[Any] = []
        self.answers: list[Any] = []

    def submit(self, request: Any) -> None:
        self.submitted.append(request.id)

    def cancel(self, ids: Any) -> None:
        self.cancelled += ids

    def step(self, timeout_s: float) -> list[Any]:
        answers, self.answers = self.answers, []
        return answers

    def load_status(self) -> EngineLoad:
        return EngineLoad(running=0, waiting=0, slots=8, tokens=0)

    def reset(self) -> None:
        pass


def lease(task: int) -> Lease:
    return Lease(
        task=task, attempt=0, purpose="train", problem="1 + 1?", answer="2", verifier="cues", strategy=None,
        autonomous=2, guided=0, min_version=0, seed=0, temperature=1.0, top_p=1.0, max_new_tokens=4,
    )  # fmt: skip


def generated(key: tuple[int, int, int]) -> Generated:
    ones = np.ones(1, np.int32)
    return Generated(id=key, tokens=ones, logprobs=-np.ones(1, np.float32), versions=0 * ones, ends=ones, finish="stop")


def test_a_failed_request_gives_its_lease_back_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []
    mailbox = SimpleNamespace(
        dealer=SimpleNamespace(connections=1),
        send=lambda message: sent.append(message) or True,
        receive=lambda timeout_s: [lease(7), lease(8)],
    )
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "", encode=lambda text, **_: [1, 2])
    engine = PlayedEngine()
    service = Service(mailbox=mailbox, node=None, engine=engine, tokenizer=tokenizer, run=Run())  # type: ignore[arg-type]
    service._prompt = lambda problem, strategy: [1, 2]  # type: ignore[method-assign]
    service.receive()
    service.admit()
    granted = sum(message.tasks for message in sent if isinstance(message, Ready))
    engine.answers = [
        generated((7, 0, 0)),  # its verdict comes after the lease has gone
        Failed(id=(7, 0, 1), error=EngineError("request (7, 0, 1): 3 servers died while it ran on them")),
        generated((8, 0, 0)),
    ]
    service.generate()
    engine.answers = [generated((7, 0, 1))]  # it was under way when it was cancelled
    service.generate()
    service.judge()
    [release] = [message for message in sent if isinstance(message, Release)]
    assert (release.task, release.servable) == (7, False) and "3 servers died" in release.reason
    assert engine.cancelled == [(7, 0, 0), (7, 0, 1)]
    assert list(service._groups) == [(8, 0)] and service._granted == granted - 1
    assert "task 7: request (7, 0, 1): 3 servers died" in caplog.text

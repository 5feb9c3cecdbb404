"""The hub client of a learner rank, over the in-memory transport."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sgpo_async.errors import DeadlineExceeded, HubError
from sgpo_async.learner import hub_client
from sgpo_async.learner.hub_client import HubClient
from sgpo_async.transport import Mailbox, RouterMailbox, memory_pair
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
    NoBatch,
    Pending,
    Published,
    Refused,
    Restore,
    Restored,
    Shard,
    Snapshot,
    SnapshotRequest,
    Stop,
    Welcome,
)

TIMEOUT_S = 120.0


class FakeHub:
    """A hub in its own thread that answers messages by a given function and records them."""

    def __init__(self, answer: Callable[[Message], list[Message]]) -> None:
        router, self.dealer = memory_pair()
        self.mail, self.received, self._answer, self._open = RouterMailbox(router), [], answer, True
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while self._open:
            for member, message in self.mail.receive(0.01):
                self.received.append(message)
                for reply in self._answer(message):
                    self.mail.send(member, reply)

    def close(self) -> None:
        self._open = False
        self._thread.join()

    def wait_for(self, kind: type) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not any(isinstance(message, kind) for message in self.received):
            assert time.monotonic() < deadline, f"no {kind.__name__}"
            time.sleep(0.01)


def answers(message: Message) -> list[Message]:
    match message:
        case Hello():
            return [Welcome(store="s", version=3)]
        case BatchRequest(step=step):
            late = Shard(step=step - 1, version=3, problems=1, rollouts=())
            return [late, Shard(step=step, version=4, problems=2, rollouts=())]
        case Commit(step=7):
            return [Refused(reason="no batch of step 7 is out")]
        case Commit(step=step):
            return [
                Evaluated(
                    version=3, pass_auto=0.25, pass_guided=1.0, problems=4, served_oldest=3, served_newest=3, lag=0.0
                ),
                Committed(step=step, status={"a": 1}),
            ]
        case Evaluate(version=version):
            return [
                Evaluated(
                    version=version,
                    pass_auto=0.5,
                    pass_guided=0.75,
                    problems=4,
                    served_oldest=version,
                    served_newest=version,
                    lag=0.0,
                )
            ]
    return []


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub(answers)
    yield hub
    hub.close()


@pytest.fixture
def client(hub: FakeHub) -> Iterator[HubClient]:
    client = HubClient(Mailbox(hub.dealer), name="learner-0", heartbeat_s=0.01)
    yield client
    client.leave("test ends")


def test_a_batch_of_another_step_is_ignored(client: HubClient) -> None:
    assert client.join(Hello(role="learner", name="learner-0")).version == 3
    assert client.batch(5, timeout_s=TIMEOUT_S).version == 4


def test_an_evaluation_that_arrives_before_the_answer_to_a_request_is_kept(client: HubClient) -> None:
    assert client.commit(1) == {"a": 1}
    client.evaluate(9)
    results = client.take_evaluations(until=9, timeout_s=TIMEOUT_S)
    assert [result.version for result in results] == [3, 9]
    assert client.take_evaluations() == []


def test_a_refusal_raises_hub_error(client: HubClient) -> None:
    with pytest.raises(HubError, match="learner-0: the hub refused the request: no batch of step 7"):
        client.commit(7)


def test_a_request_without_an_answer_fails_at_the_deadline(client: HubClient) -> None:
    with pytest.raises(DeadlineExceeded, match=r"learner-0: no Snapshot from the hub within"):
        client._ask(Goodbye, Shard, "Snapshot", 0.05)


def test_a_rank_that_has_to_stop_says_so_while_it_waits_for_a_batch() -> None:
    """And at its next request, when it gets its batch first."""
    reason = ""
    waited = threading.Event()

    def answer(message: Message) -> list[Message]:
        nonlocal reason
        if isinstance(message, BatchRequest) and message.step == 6:
            if not message.stopping:
                reason = "learner rank 0 received SIGTERM"
                waited.set()
                return []
            return [NoBatch(step=6, reason=message.stopping)]
        return answers(message)

    hub = FakeHub(answer)
    client = HubClient(Mailbox(hub.dealer), name="learner-0", heartbeat_s=TIMEOUT_S, stopping=lambda: reason)
    try:
        assert isinstance(client.batch(5, timeout_s=TIMEOUT_S), Shard)
        assert client.batch(6, timeout_s=TIMEOUT_S) == NoBatch(step=6, reason="learner rank 0 received SIGTERM")
        assert waited.is_set()
        requests = [message for message in hub.received if isinstance(message, BatchRequest) and message.step == 6]
        assert [message.stopping for message in requests] == ["", "learner rank 0 received SIGTERM"]
        assert client.take_evaluations(until=99, timeout_s=TIMEOUT_S) == [], "it waits for no evaluation any more"
        assert isinstance(client.batch(7, timeout_s=TIMEOUT_S), Shard), "the batch that the hub has formed already"
    finally:
        client.leave("test ends")
        hub.close()


def test_a_rank_of_an_interrupted_hub_gets_its_last_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a request fails at once, with the hub's reason; without it, it would wait for two minutes."""

    def answer(message: Message) -> list[Message]:
        match message:
            case Evaluate():
                return [Stop(reason="the hub received SIGINT")]
            case SnapshotRequest(step=9):
                return []
            case SnapshotRequest(step=step):
                return [Snapshot(step=step, state=b"state")]
        return answers(message)

    hub = FakeHub(answer)
    client = HubClient(Mailbox(hub.dealer), name="learner-0", heartbeat_s=TIMEOUT_S)
    try:
        client.evaluate(7)
        assert client.take_evaluations(until=7, timeout_s=TIMEOUT_S) == []
        assert client.ended == "the hub received SIGINT"
        assert client.snapshot(8) == b"state"
        client._answers_until = time.monotonic() + 0.3
        with pytest.raises(HubError, match="learner-0: the hub has ended without Snapshot: the hub received SIGINT"):
            client.snapshot(9)
    finally:
        client.leave("test ends")
        hub.close()


def test_the_timeout_of_a_batch_counts_the_time_without_progress(client: HubClient, hub: FakeHub) -> None:
    """The run makes progress until the third request; the batch would come with the tenth."""

    def answer(message: Message) -> list[Message]:
        requests = sum(isinstance(message, BatchRequest) for message in hub.received)
        return [Pending(idle_s=0.0 if requests <= 3 else 60.0)] if isinstance(message, BatchRequest) else []

    hub._answer = answer
    with pytest.raises(DeadlineExceeded, match="no batch of step 5 .* from the hub within 2 s"):
        client.batch(5, timeout_s=2.0)
    requests = sum(isinstance(message, BatchRequest) for message in hub.received)
    assert requests > 3, "the progress with the first three has moved the deadline"


def test_while_rank_0_waits_for_an_evaluation_it_calls_meanwhile(
    client: HubClient, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "REPEAT_S", 0.05)
    calls = []

    def answer(message: Message) -> list[Message]:
        if not isinstance(message, Evaluate):
            return []
        return answers(message) if len(calls) >= 3 else [Pending(idle_s=0.0)]

    hub._answer = answer
    (result,) = client.take_evaluations(until=9, timeout_s=TIMEOUT_S, meanwhile=lambda: calls.append(1))
    assert result.version == 9
    assert len(calls) >= 3


def test_a_lost_request_is_repeated_until_it_is_answered(client: HubClient, hub: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr(hub_client, "REPEAT_S", 0.05)

    def answer_the_third_request(message: Message) -> list[Message]:
        requests = sum(isinstance(message, SnapshotRequest) for message in hub.received)
        return [Snapshot(step=4, state=b"s")] if requests == 3 else []

    hub._answer = answer_the_third_request
    assert client.snapshot(4) == b"s"


def test_a_repeated_restore_has_the_id_of_the_first(client: HubClient, hub: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr(hub_client, "REPEAT_S", 0.05)

    def answer_the_third_request(message: Message) -> list[Message]:
        return [Restored(version=9)] if len(restores(hub)) == 3 else []

    hub._answer = answer_the_third_request
    assert client.restore(b"state") == 9
    ids = {restore.id for restore in restores(hub)}
    assert len(ids) == 1
    hub._answer = lambda message: [Restored(version=10)] if isinstance(message, Restore) else []
    assert client.restore(b"state") == 10
    assert ids < {restore.id for restore in restores(hub)}, "another Restore has another id"


def restores(hub: FakeHub) -> list[Restore]:
    return [message for message in hub.received if isinstance(message, Restore)]


def test_after_a_reconnection_everything_that_may_be_lost_is_sent_again(client: HubClient, hub: FakeHub) -> None:
    client.join(Hello(role="learner", name="learner-0"))
    hub._answer = lambda message: []
    canary = np.array([-1.5], np.float32)
    client.published(2, 22, None, "/old", b"")
    client.published(3, 33, canary, "/old", b"")
    client.moved("/store", b"secret")
    client.evaluate(3)
    client.evaluate(4)
    result: list[bytes] = []
    waiting = threading.Thread(target=lambda: result.append(client.snapshot(4)))
    waiting.start()
    hub.wait_for(SnapshotRequest)
    before = len(hub.received)
    hub._answer = lambda message: [Snapshot(step=4, state=b"s")] if isinstance(message, SnapshotRequest) else []
    hub.dealer.connections += 1
    waiting.join(TIMEOUT_S)
    assert result == [b"s"]
    again = [message for message in hub.received[before:] if not isinstance(message, Heartbeat)]
    assert again == [
        Published(version=2, digest=22, store="/store", secret=b"secret"),  # actors may still send what it has sampled
        Published(version=3, digest=33, canary=canary, store="/store", secret=b"secret"),
        Evaluate(version=3),
        Evaluate(version=4),
        SnapshotRequest(step=4),
    ]


def test_a_result_that_arrives_twice_counts_once(client: HubClient, hub: FakeHub) -> None:
    hub._answer = lambda message: 2 * answers(message)
    client.evaluate(9)
    client.take_evaluations(until=9, timeout_s=TIMEOUT_S)
    client.commit(1)
    assert [result.version for result in client.take_evaluations()] == [3]


def test_a_hub_that_does_not_answer_the_end_of_the_run_costs_a_warning(
    client: HubClient, hub: FakeHub, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_client, "FINISH_S", 0.05)
    client.finish()
    hub.wait_for(Finish)
    assert "no Stop from the hub" in caplog.text


def test_heartbeats_are_sent_while_the_main_thread_is_busy_and_goodbye_when_it_leaves(
    hub: FakeHub, client: HubClient
) -> None:
    client.join(Hello(role="learner", name="learner-0"))
    hub.wait_for(Heartbeat)
    client.leave("done")
    hub.wait_for(Goodbye)


def test_the_error_of_a_message_that_cannot_be_sent_is_raised_by_the_next_request(client: HubClient) -> None:
    client._outgoing.append(Restore(state=bytes(2**27)))
    with pytest.raises(Exception, match="larger than"):
        client.batch(0, timeout_s=TIMEOUT_S)

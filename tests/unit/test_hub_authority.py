"""Who may act as the learner: the rule, the token's file, and what the hub does with a message that it forbids."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_support import Driver, Source, make_run
from test_hub_loop import Member, Running, eventually

from sgpo_async.errors import SgpoError
from sgpo_async.hub.authority import OF_LEARNERS, Authority
from sgpo_async.hub.events import CloseSender, Expelled, Forbidden, Send, SenderUp, Warn
from sgpo_async.hub.loop import WATCHING_S
from sgpo_async.transport import MemoryRouter
from sgpo_async.transport.token import TOKEN_FILE, make_token, token_of
from sgpo_async.wire import records as wire

LEARNERS, ACTORS = b"key of the learner", b"key of the actors"
REQUESTS = [
    wire.BatchRequest(step=0),
    wire.Commit(step=0),
    wire.Published(version=0),
    wire.Evaluate(version=0),
    wire.SnapshotRequest(step=0),
    wire.Restore(state=b""),
    wire.Finish(),
]
HELLO = wire.Hello(role="learner", name="learner-0")


def test_requests_are_all_that_only_learners_send() -> None:
    assert {type(message) for message in REQUESTS} == set(OF_LEARNERS)


@pytest.mark.parametrize("message", [HELLO, *REQUESTS], ids=lambda message: type(message).__name__)
def test_with_keys_only_the_learners_key_acts_as_the_learner(message: wire.Message) -> None:
    authority = Authority(key=LEARNERS)
    assert not authority.objection(message, key=LEARNERS, from_rank=False)
    for key in (ACTORS, b""):
        objection = authority.objection(message, key=key, from_rank=False)
        assert objection.startswith(f"{type(message).__name__} of a learner needs the learner's key: give the learner")


@pytest.mark.parametrize("message", [wire.Heartbeat(), wire.Goodbye(), wire.Hello(role="actor", name="a")])
def test_with_keys_nobody_else_sends_under_the_identity_of_a_rank(message: wire.Message) -> None:
    authority = Authority(key=LEARNERS)
    assert authority.objection(message, key=ACTORS, from_rank=True)
    assert not authority.objection(message, key=LEARNERS, from_rank=True)


@pytest.mark.parametrize("authority", [Authority(key=LEARNERS), Authority(token="secret")])
def test_actors_and_watchers_need_no_more_than_before(authority: Authority) -> None:
    hello = wire.Hello(role="actor", name="a")
    for message in (hello, wire.StatusRequest(), wire.SettingsRequest(), wire.Heartbeat(), wire.Goodbye()):
        for key in (ACTORS, LEARNERS):
            assert not authority.objection(message, key=key, from_rank=False)


@pytest.mark.parametrize("token", ["", "secre", "secret ", "é"])
def test_without_keys_a_learner_must_know_the_token(token: str) -> None:
    authority = Authority(token="secret", token_file="/runs/demo/hub.token")
    objection = authority.objection(wire.Hello(role="learner", name="l", token=token), key=b"", from_rank=False)
    assert "a learner without keys must know the token in /runs/demo/hub.token: start it as the hub's user" in objection
    assert "secret" not in objection
    assert not authority.objection(wire.Hello(role="learner", name="l", token="secret"), key=b"", from_rank=False)
    assert "secret" not in repr(authority) and "secret" not in repr(
        wire.Hello(role="learner", name="l", token="secret")
    )


# ---- the file


def test_the_token_is_private_and_survives_a_restart_of_the_hub(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        token = make_token(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600
    assert len(token) == 64 and make_token(tmp_path) == token_of(tmp_path) == token
    assert make_token(make_folder(tmp_path / "other")) != token


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("how", ["readable", "link", "empty"])
def test_a_token_that_others_may_know_is_replaced(tmp_path: Path, how: str) -> None:
    path = tmp_path / TOKEN_FILE
    if how == "link":
        (tmp_path / "elsewhere").write_text("known\n")
        (tmp_path / "elsewhere").chmod(0o600)
        path.symlink_to("elsewhere")
    else:
        path.write_text("known\n" if how == "readable" else "")
        path.chmod(0o644 if how == "readable" else 0o600)
    token = make_token(tmp_path)
    assert len(token) == 64 and token_of(tmp_path) == token
    assert not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_without_a_token_has_the_empty_one(tmp_path: Path) -> None:
    assert token_of(tmp_path) == token_of(tmp_path / "missing") == ""
    (tmp_path / TOKEN_FILE).write_bytes(b"\xff")
    assert token_of(tmp_path) == ""


def test_a_token_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(SgpoError, match=r"missing: cannot be written \(No such file or directory\)"):
        make_token(tmp_path / "missing")


# ---- the hub


@pytest.fixture
def driver() -> Driver:
    return Driver(make_run(), Source())


def test_a_forbidden_message_is_refused_and_counted_and_logged_once(driver: Driver) -> None:
    first = driver.handle(Forbidden(b"x", "no"))
    assert first == [Warn("a message was refused: no"), Send(b"x", wire.Refused(reason="no", final=True))]
    assert driver.handle(Forbidden(b"y", "no")) == [Send(b"y", wire.Refused(reason="no", final=True))]
    assert driver.core.status()["refused"] == 2


def test_no_actor_can_keep_a_learner_out_by_its_name(driver: Driver) -> None:
    driver.send(b"x", wire.Hello(role="actor", name="r0"))
    driver.learner()
    assert driver.core.learner_ranks.complete
    driver.send(b"y", wire.Hello(role="actor", name="r0"))
    assert "is taken" in driver.only(b"y", wire.Refused).reason


def test_no_quarantined_actor_keeps_a_learner_out(driver: Driver) -> None:
    driver.actor(b"r0")
    for _ in range(3):
        driver.send(b"r0", wire.Ready(tasks=-1, version=0))
    assert "r0" in driver.core.status()["quarantined"]
    driver.send(b"new", wire.Hello(role="learner", name="r0"))
    assert driver.only(b"new", wire.Welcome)


def test_the_status_shows_no_identity(driver: Driver) -> None:
    """Who takes over an identity gets its messages."""
    driver.learner()
    driver.send(b"r0", wire.Ready(tasks=1, version=0))
    status = driver.core.status()
    assert status["rejected"] == 1 and status["last_rejection"]
    assert b"r0".hex() not in repr(status["last_rejection"])


def of_node(key: bytes, name: str) -> bytes:
    """The identity of an actor of the node with this key."""
    return key.ljust(40, b".") + name.encode().rjust(32, b"0")


def test_who_has_a_revoked_key_loses_membership_leases_and_weights(driver: Driver) -> None:
    driver.learner()
    members = [of_node(key, name) for key, name in ((b"n1", "a"), (b"n1", "b"), (b"n2", "c"))]
    for member in members:
        driver.send(member, wire.Hello(role="actor", name=chr(member[-1])))
        driver.handle(SenderUp(member, "127.0.0.1", 4000))
    for member in members[:2]:
        driver.send(member, wire.Ready(tasks=1, version=0))
    leases = [*driver.take(members[0], wire.Lease), *driver.take(members[1], wire.Lease)]
    effects = driver.handle(Expelled(b"n1".ljust(40, b"."), "the key n1 was revoked"))
    assert Warn("the key n1 was revoked; expelled: a, b") in effects
    for member in members[:2]:
        assert Send(member, wire.Refused(reason="the key n1 was revoked", final=True)) in effects
        assert CloseSender(member) in effects
    assert list(driver.core.actors) == members[2:]
    driver.send(members[2], wire.Hello(role="actor", name="c"))
    driver.handle(SenderUp(members[2], "127.0.0.1", 4000))
    driver.send(members[2], wire.Ready(tasks=2, version=0))
    again = driver.take(members[2], wire.Lease)
    assert [(lease.task, lease.attempt) for lease in again] == [(lease.task, 1) for lease in leases] and len(again) == 2


def test_an_expelled_member_is_one_and_not_those_with_a_similar_identity(driver: Driver) -> None:
    driver.actor(b"a")
    driver.actor(b"ab")
    driver.handle(Expelled(b"a", "too much"))
    assert list(driver.core.actors) == [b"ab"]
    told = Send(b"x", wire.Refused(reason="too much", final=True))
    assert driver.handle(Expelled(b"x", "too much")) == [Warn("too much; it had not joined"), told]


def test_a_rank_that_sends_too_much_is_no_rank_any_more_and_is_told(driver: Driver) -> None:
    driver.learner()
    effects = driver.handle(Expelled(b"r0", "too much"))
    assert effects[:2] == [Warn("too much; expelled: r0"), Send(b"r0", wire.Refused(reason="too much", final=True))]
    assert not driver.core.learner_ranks.ranks


def test_who_is_quarantined_under_too_many_names_is_refused_under_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgpo_async.hub.core.MAX_QUARANTINED", 2)
    driver = Driver(make_run(), Source())
    present, other = of_node(b"n1", "present"), of_node(b"n2", "x")
    driver.send(present, wire.Hello(role="actor", name="present"))
    for name in ("1", "2"):
        driver.send(of_node(b"n1", name), wire.Hello(role="actor", name=name))
        for _ in range(3):
            driver.send(of_node(b"n1", name), wire.Ready(tasks=-1, version=0))
    driver.send(of_node(b"n1", "3"), wire.Hello(role="actor", name="3"))
    refused = driver.only(of_node(b"n1", "3"), wire.Refused)
    assert refused.final and "2 actors with the same key are quarantined" in refused.reason
    driver.send(present, wire.Hello(role="actor", name="present"))  # it returns
    driver.send(other, wire.Hello(role="actor", name="3"))
    assert list(driver.core.actors) == [present, other]


def test_nobody_with_another_key_has_an_actors_name_quarantined(driver: Driver) -> None:
    bad, good = of_node(b"n1", "1"), of_node(b"n2", "2")
    driver.send(bad, wire.Hello(role="actor", name="node"))
    for _ in range(3):
        driver.send(bad, wire.Ready(tasks=-1, version=0))
    assert driver.core.status()["quarantined"].keys() == {"node"}
    driver.send(of_node(b"n1", "3"), wire.Hello(role="actor", name="node"))
    assert driver.only(of_node(b"n1", "3"), wire.Refused).final
    driver.send(good, wire.Hello(role="actor", name="node"))
    assert good in driver.core.actors


def test_an_actor_may_not_ask_for_any_number_of_leases() -> None:
    driver = Driver(make_run(max_leases=5), Source())
    driver.learner()
    driver.actor(b"a", credit=5)
    assert driver.core.status()["rejected"] == 0
    driver.send(b"a", wire.Ready(tasks=1, version=0))
    refused = driver.only(b"a", wire.Refused)
    remedy = "but hub.max_leases is 5: raise hub.max_leases or lower the actor's slots"
    assert refused.final and refused.reason.startswith("a has ") and refused.reason.endswith(remedy)
    status = driver.core.status()
    assert (len(status["actors"]), status["refused"], status["quarantined"]) == (0, 1, {})


def test_who_has_not_asked_for_the_status_lately_is_forgotten(guarded: Running) -> None:
    loop = guarded.loop
    for member, now in ((b"a", 1.0), (b"b", 2.0), (b"a", 3.0), (b"c", 2.5 + WATCHING_S)):
        loop._watched_by(member, now)
    assert loop._watchers == {b"a": 3.0, b"c": 2.5 + WATCHING_S}


@pytest.fixture
def guarded() -> Iterator[Running]:
    running = Running(MemoryRouter(), Authority(key=LEARNERS))
    yield running
    running.reason = "the test is over"
    running.join()


def test_the_loop_judges_each_message_by_the_key_of_its_connection(guarded: Running) -> None:
    ranks = guarded.loop._core.learner_ranks
    learner = Member(guarded.router.dealer(b"l", LEARNERS))
    learner.send(HELLO)
    learner.wait(wire.Welcome)
    stranger = Member(guarded.router.dealer(b"x", ACTORS))
    stranger.send(HELLO)
    assert "needs the learner's key" in stranger.wait(wire.Refused).reason
    taken_over = Member(guarded.router.dealer(b"l", ACTORS))  # with the identity of rank 0
    for message in (wire.Goodbye(), wire.Finish(), wire.Published(version=0)):
        taken_over.send(message)
        assert "needs the learner's key" in taken_over.wait(wire.Refused).reason
    assert ranks.complete and guarded.loop._core.published == -1
    learner = Member(guarded.router.dealer(b"l", LEARNERS))
    learner.send(wire.Published(version=0))
    eventually(lambda: guarded.loop._core.published == 0)

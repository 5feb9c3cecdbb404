"""Which messages the hub reads: by key, identity and number; without sockets and with a clock of our own."""

import shutil
from pathlib import Path

import pytest

from sgpo_async.transport.admission import COUNTED_BYTES, LOOK_S, PARTING_S, RATE_S, Admission, KnownKeys
from sgpo_async.transport.base import RANDOM_BYTES, owner_of
from sgpo_async.transport.keys import add_actors, create_keys, public_key, revoke

RANDOM = b"0" * RANDOM_BYTES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def admission(folder: Path | None, clock: Clock, *, most: int = 0) -> Admission:
    return Admission(KnownKeys(folder) if folder else None, most, clock)


def test_an_identity_belongs_to_one_key(tmp_path: Path, clock: Clock) -> None:
    create_keys(tmp_path)
    add_actors(tmp_path, ["n1", "n2"])
    judge = admission(tmp_path, clock)
    keys = [public_key(tmp_path, name) for name in ("learner", "actor", "actor-n1", "actor-n2")]
    for key in keys:
        assert judge.callback("*", key) and owner_of(key + RANDOM) == key
        assert judge.admits(key + RANDOM, key, 1)
        assert not judge.admits(RANDOM, key, 1) and not judge.admits(key, key, 1)
        assert not judge.admits(key + RANDOM + b"0", key, 1) and not judge.admits(b"", key, 1)
    assert judge.expelled() == []
    for key in keys:
        assert not any(judge.admits(other + RANDOM, key, 1) for other in keys if other != key)
    assert judge.expelled() == [
        (keys[2], "the key n1 was used with the identity of a member with another key"),
        (keys[3], "the key n2 was used with the identity of a member with another key"),
    ], "each of them once, and never those of the learner and of several nodes"
    assert not judge.admits(keys[2] + RANDOM, keys[2], 1) and not judge.callback("*", keys[2])
    assert judge.admits(keys[1] + RANDOM, keys[1], 1) and judge.admits(keys[0] + RANDOM, keys[0], 1)
    server = public_key(tmp_path, "server")
    assert not judge.callback("*", server) and not judge.admits(server + RANDOM, server, 1)
    assert not judge.admits(RANDOM, b"", 1)


def test_without_keys_everybody_may_send(clock: Clock) -> None:
    judge = admission(None, clock)
    assert judge.admits(b"x", b"", 10**9) and judge.admits(RANDOM, b"", 1) and judge.expelled() == []


def test_without_keys_an_identity_names_no_owner(clock: Clock) -> None:
    """Each owner may have so many quarantined names; who could choose the owner would evade this limit."""
    judge = admission(None, clock)
    assert not judge.admits(b"x" + RANDOM, b"", 1) and judge.is_hopeless(b"x" + RANDOM)
    assert judge.expelled() == []


def test_a_revoked_key_is_noticed_at_the_next_look_and_a_disk_that_is_away_revokes_none(
    tmp_path: Path, clock: Clock
) -> None:
    folder = tmp_path / "keys"
    create_keys(folder)
    add_actors(folder, ["n1"])
    judge, n1 = admission(folder, clock), public_key(folder, "actor-n1")
    folder.rename(tmp_path / "away")
    clock.now += LOOK_S
    judge.look()
    assert judge.admits(n1 + RANDOM, n1, 1)
    (tmp_path / "away").rename(folder)
    shutil.copy(folder / "actor-n1.key", tmp_path / "copy")
    revoke(folder, "n1")
    judge.look()
    assert judge.admits(n1 + RANDOM, n1, 1), "not looked since"
    clock.now += LOOK_S
    judge.look()
    assert not judge.admits(n1 + RANDOM, n1, 1) and not judge.callback("*", n1)
    assert judge.expelled() == [(n1, "the key n1 was revoked")] and judge.expelled() == []
    assert not judge.is_hopeless(n1 + RANDOM), "until it has been told why"
    clock.now += PARTING_S + 0.1
    assert judge.is_hopeless(n1 + RANDOM)
    shutil.copy(tmp_path / "copy", folder / "actor-n1.key")
    clock.now += LOOK_S
    judge.look()
    assert judge.admits(n1 + RANDOM, n1, 1) and judge.expelled() == []


def test_a_key_file_that_cannot_be_read_revokes_nothing_and_one_with_another_key_does(
    tmp_path: Path, clock: Clock
) -> None:
    create_keys(tmp_path)
    add_actors(tmp_path, ["n1", "n2"])
    judge = admission(tmp_path, clock)
    n1, n2 = (public_key(tmp_path, f"actor-{name}") for name in ("n1", "n2"))
    file = tmp_path / "actor-n1.key"
    file.write_text("half of a k")
    clock.now += LOOK_S
    judge.look()
    assert judge.admits(n1 + RANDOM, n1, 1) and judge.expelled() == []
    shutil.copy(tmp_path / "actor-n2.key", file)
    clock.now += LOOK_S
    judge.look()
    assert judge.expelled() == [(n1, "the key n1 was revoked")] and judge.admits(n2 + RANDOM, n2, 1)
    assert not judge.admits(n1 + RANDOM, n1, 1)


def test_a_member_may_send_its_rate_for_ever_and_more_only_for_a_while(clock: Clock) -> None:
    judge = admission(None, clock, most=10)
    for _ in range(1000):
        assert judge.admits(b"a", b"", 100)
        clock.now += 0.1
    allowed = int(10 * RATE_S)
    assert all(judge.admits(b"b", b"", 100) for _ in range(allowed))
    assert judge.expelled() == []
    assert not judge.admits(b"b", b"", 100) and judge.admits(b"a", b"", 100)
    assert judge.expelled() == [(b"b", "more than hub.max_messages_per_s=10 messages a second for 10 s")]
    assert not judge.is_hopeless(b"b"), "it is told why first"
    clock.now += 1.1 * PARTING_S
    assert not judge.admits(b"b", b"", 100) and judge.is_hopeless(b"b") and judge.expelled() == []
    clock.now += 1.1 * RATE_S  # it has been silent
    judge.look()
    assert judge.admits(b"b", b"", 100)


def test_a_large_message_counts_for_several(clock: Clock) -> None:
    judge = admission(None, clock, most=10)
    allowed = int(10 * RATE_S)
    assert judge.admits(b"a", b"", (allowed - 1) * COUNTED_BYTES)
    assert not judge.admits(b"a", b"", 1)

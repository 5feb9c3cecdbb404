"""The secret of a session: what Torch RPC unpickles, and what counts in the rendezvous."""

import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.rpc import internal

from sgpo_async.errors import SessionError, Superseded
from sgpo_async.session import calls
from sgpo_async.session.authenticated_store import AuthenticatedStore
from sgpo_async.session.messages import Request, Response
from sgpo_async.session.rpc_pickler import SessionPickler, load_job
from sgpo_async.session.secret import SECRET_BYTES, Forged, authenticate, new_secret, verify

SECRET, OTHER = b"a" * SECRET_BYTES, b"b" * SECRET_BYTES


def pickler(secret: bytes = SECRET) -> SessionPickler:
    return SessionPickler(secret, calls.FROM_PEER)


class Bomb:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# ---- authenticated messages


def test_secrets_are_long_and_fresh() -> None:
    assert len({new_secret() for _ in range(100)}) == 100 and len(new_secret()) == SECRET_BYTES


@given(st.binary(max_size=100), st.binary(max_size=10))
def test_verify_returns_what_was_authenticated(data: bytes, purpose: bytes) -> None:
    assert verify(SECRET, purpose, authenticate(SECRET, purpose, data)) == data


@given(st.binary(max_size=50), st.integers(0), st.integers(1, 255))
def test_no_altered_byte_is_accepted(data: bytes, place: int, change: int) -> None:
    message = bytearray(authenticate(SECRET, b"p", data))
    message[place % len(message)] ^= change
    with pytest.raises(Forged):
        verify(SECRET, b"p", bytes(message))


@given(st.binary(max_size=50), st.integers(0))
def test_no_part_of_a_message_is_accepted(data: bytes, length: int) -> None:
    message = authenticate(SECRET, b"p", data)
    with pytest.raises(Forged):
        verify(SECRET, b"p", message[: length % len(message)])


def test_a_message_of_another_session_or_purpose_is_not_accepted() -> None:
    for secret, purpose, data in (
        (OTHER, b"p", b"x"),
        (SECRET, b"q", b"x"),
        (SECRET, b"px", b""),
        (SECRET, b"", b"px"),
    ):
        with pytest.raises(Forged):
            verify(SECRET, b"p", authenticate(secret, purpose, data))


# ---- Torch RPC's pickles


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"manifest",
        ("text", 1.5, {1, 2}, {"a": [True]}),
        Response(3, value=["host", 1], error=("SessionError", "x")),
        internal.PythonUDF(calls.submit, (Request(1, "open", 2.0, {"group": "g"}),), {}),
        internal.RemoteException("text", ValueError),
        internal.RemoteException("text", Superseded),
    ],
    ids=("nothing", "bytes", "plain values", "response", "call", "error of Python", "error of ours"),
)
def test_the_messages_of_a_session_pass(value: Any) -> None:
    data, tensors = pickler().serialize(value)
    assert pickler().deserialize(data, tensors) == value


def test_tensors_travel_beside_the_pickle() -> None:
    sent = [torch.ones(1000), torch.arange(3), torch.nn.Parameter(torch.ones(2))]
    data, tensors = pickler().serialize({"a": sent[0], "b": sent[1:]})
    assert len(data) < 200 and all(a is b for a, b in zip(tensors, sent, strict=True))
    received = pickler().deserialize(data, tensors)
    assert received["a"] is sent[0] and received["b"] == sent[1:]
    with pytest.raises(RuntimeError, match="refused: a tensor of the message is missing"):
        pickler().deserialize(data, tensors[:1])


def test_an_exception_of_another_package_travels_as_a_runtime_error() -> None:
    data, tensors = pickler().serialize(internal.RemoteException("text", Forged))
    assert pickler().deserialize(data, tensors) == internal.RemoteException("text", RuntimeError)


@pytest.mark.parametrize("how", ["plain", "another session", "truncated", "known secret"])
def test_nothing_is_unpickled_that_is_not_of_this_session_or_not_allowed(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "made"))
    message = {
        "plain": bomb,
        "another session": pickler(OTHER).serialize(Bomb(tmp_path / "made"))[0],
        "truncated": pickler().serialize(Bomb(tmp_path / "made"))[0][:-1],
        "known secret": pickler().serialize(Bomb(tmp_path / "made"))[0],
    }[how]
    own = pickler()
    reason = "mkdir is not allowed" if how == "known secret" else "not authenticated with the session's secret"
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"refused: .*{reason}"):
            own.deserialize(message, [])
    assert not (tmp_path / "made").exists()
    assert (own.opened, own.refused) == (0, 3)
    assert len(caplog.records) == 1, "logged once"
    pickle.loads(bomb)
    assert (tmp_path / "made").exists(), "the bomb works"


GLOBALS = """
builtins.eval builtins.getattr builtins.__import__ builtins.type builtins.SystemExit os.system torch.load
sgpo_async.session.calls.callee sgpo_async.session.calls.Callee sgpo_async.errors.annotations
torch.distributed.rpc.internal._run_function torch.distributed.rpc.api.rpc_sync
"""


@pytest.mark.parametrize("name", GLOBALS.split())
def test_other_globals_are_refused(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    data = b"\x80\x04" + b"".join(bytes([0x8C, len(text)]) + text.encode() for text in (module, attribute)) + b"\x93."
    with pytest.raises(RuntimeError, match=f"refused: {name} is not allowed in a message"):
        pickler().deserialize(authenticate(SECRET, b"rpc", data), [])


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", b"\x80\x04K\x01Q."])
def test_a_damaged_pickle_of_a_peer_is_refused(data: bytes) -> None:
    with pytest.raises(RuntimeError, match="refused"):
        pickler().deserialize(authenticate(SECRET, b"rpc", data), [])


# ---- jobs


def test_a_job_has_functions_by_name_dtypes_and_plain_values(tmp_path: Path) -> None:
    job = (test_a_damaged_pickle_of_a_peer_is_refused, ({"a": [1]},), {"dtype": torch.bfloat16})
    name = f"{__name__}:{job[0].__name__}"
    assert load_job(pickle.dumps(job), [name]) == job
    for wrong in (job, Bomb(tmp_path / "made"), (torch.load, (), {})):
        with pytest.raises(
            SessionError, match=r"compute: .* is not allowed in a message; the weight sender computes only"
        ):
            load_job(pickle.dumps(wrong), ["another:function"])
    assert not (tmp_path / "made").exists()


# ---- the rendezvous


def stores() -> tuple[dist.HashStore, AuthenticatedStore]:
    raw = dist.HashStore()
    return raw, AuthenticatedStore(raw, SECRET)


def test_authenticated_values_are_read_back_also_by_torch() -> None:
    raw, authenticated = stores()
    prefixed = dist.PrefixStore("prefix", authenticated)
    prefixed.set("key", "value")
    assert prefixed.get("key") == b"value" == AuthenticatedStore(raw, SECRET).get("prefix/key")
    assert prefixed.compare_set("new", "", "mine") == b"mine" == prefixed.compare_set("new", "", "late")
    assert prefixed.check(["key"]) and not prefixed.check(["missing"])
    prefixed.wait(["key"], timedelta(seconds=1))
    assert authenticated.multi_get(["prefix/key", "prefix/new"]) == [b"value", b"mine"]


def test_values_of_strangers_are_refused() -> None:
    raw, authenticated = stores()
    authenticated.set("key", "value")
    raw.set("key", "a stranger's")
    assert authenticated.get("key") == b"value", "keys are hashed with the secret"
    names = [authenticated._name(key) for key in ("key", "other", "here")]
    raw.set(names[1], raw.get(names[0]))  # a value that is authenticated for another key
    raw.set(names[0], "a stranger's")
    raw.set(names[2], "a stranger's")
    for key in ("key", "other"):
        with pytest.raises(RuntimeError, match=f"the value of {key} in the rendezvous is a stranger's"):
            authenticated.get(key)
    assert not authenticated._is_set("here") and not authenticated._is_set("missing")
    authenticated.set("here", b"")
    authenticated.wait_until_set("here")

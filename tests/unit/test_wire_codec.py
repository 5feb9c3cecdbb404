"""Every record survives a round trip; invalid frames raise only WireError and allocate no memory for false lengths."""

import dataclasses
import math
import random
import string
import sys
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.errors import ProtocolMismatch, WireError
from sgpo_async.wire import PROTOCOL, decode, encode, records
from sgpo_async.wire.codec import MAX_HEADER, MAX_LEVELS, PLANS
from sgpo_async.wire.fields import MAX_DEPTH, unexpected
from sgpo_async.wire.records import (
    Ack,
    BenchmarkScore,
    Canary,
    Committed,
    Evaluated,
    Heartbeat,
    Hello,
    Lease,
    Message,
    PartialRollout,
    Progress,
    Restore,
    Rollout,
    Settings,
    Shard,
    StatusRequest,
)
from sgpo_async.wire.rules import MAX_COUNT, MAX_HELD

LIMIT = 2**20
VERSION = msgpack.packb(PROTOCOL)
RECORDS = get_args(Message)
PARTS = {BenchmarkScore, PartialRollout}  # records that are part of a message
INT64 = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Whether two records are equal in type and value, arrays included."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def array_of(dtype: str, elements: st.SearchStrategy, length: st.SearchStrategy) -> st.SearchStrategy:
    return length.flatmap(lambda n: st.lists(elements, min_size=n, max_size=n)).map(
        lambda values: np.array(values, dtype)
    )


def values(annotation: Any) -> st.SearchStrategy:
    """Every value that the annotation of a field allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return array_of(arguments[1], st.integers(-(2**31), 2**31 - 1), st.integers(0, 9))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(st.text(), PLAIN, max_size=4)
    if origin is tuple:
        return st.lists(records_of(arguments[0]), max_size=3).map(tuple)
    if origin in (types.UnionType, Union):
        return st.one_of(*(st.none() if a is types.NoneType else values(a) for a in arguments))
    return {
        int: INT64,
        float: st.floats(allow_nan=False),
        str: st.text(),
        bytes: st.binary(),
        bool: st.booleans(),
    }[annotation]


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    spans = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    length = sum(spans)
    ids = st.integers(0, 2**31 - 1)
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
    hints = get_type_hints(Rollout, include_extras=True)
    scalars = ("task", "attempt", "slot", "purpose", "finish")
    guided = draw(st.booleans())
    top = draw(st.just(0) | st.integers(1, 3)) * length if guided else 0
    sizes = draw(st.none() | array_of("<i4", st.integers(0, 3), st.just(length)))
    return Rollout(
        **{name: draw(values(hints[name])) for name in scalars},
        prompt=draw(array_of("<i4", ids, st.integers(1, 9))),
        tokens=draw(array_of("<i4", ids, st.just(length))),
        logprobs=draw(array_of("<f4", finite, st.just(length))),
        versions=draw(array_of("<i4", ids, st.just(len(spans)))),
        digests=draw(array_of("<i8", INT64, st.just(len(spans)))),
        ends=np.cumsum(spans, dtype=np.int32),
        reward=draw(st.floats(0, 1)),
        guided=guided,
        unguided_logprob=draw(finite) if guided else None,
        top_tokens=draw(array_of("<i4", ids, st.just(top))) if top else None,
        top_logprobs=draw(array_of("<f4", finite, st.just(top))) if top else None,
        kept=None if sizes is None else draw(array_of("<i4", ids, st.just(int(sizes.sum())))),
        kept_sizes=sizes,
    )


@st.composite
def partial_rollouts(draw: st.DrawFn, *, start: st.SearchStrategy[int] = st.integers(0, 2**40)) -> PartialRollout:  # noqa: B008
    """The beginning of a rollout, or a later part of one."""
    whole = draw(rollouts())
    fields = {
        field.name: getattr(whole, field.name)
        for field in dataclasses.fields(PartialRollout)
        if hasattr(whole, field.name)
    }
    return PartialRollout(
        **fields
        | {
            "start": draw(start),
            "slot": draw(st.integers(0, 99)),
            "finish": draw(st.sampled_from(("", "stop", "length"))),
        }
    )


def records_of(record: type) -> st.SearchStrategy:
    if record is Rollout:
        return rollouts()
    if record is PartialRollout:
        return partial_rollouts()
    hints = get_type_hints(record, include_extras=True)
    fields = {name: values(hint) for name, hint in hints.items()}
    if record is Lease:
        above_0 = st.floats(0, 1, exclude_min=True)
        fields |= {"temperature": above_0, "max_new_tokens": st.integers(1, 2**40)}
        fields |= {"top_logprobs_num": st.integers(0, 2**20), "turns": st.integers(0, 2**20)}
        fields |= {"top_p": st.just(1.0) | above_0, "top_k": st.integers(0, 2**20)}
        fields["partial"] = st.lists(partial_rollouts(start=st.just(0)), max_size=3).map(tuple)
    if record is Canary:
        fields["engine"] = st.text(alphabet=string.printable[:95], max_size=200)
        fields["logprobs"] = array_of("<f4", st.integers(-100, 0), st.integers(1, 9))
    if record is Heartbeat:
        fields |= dict.fromkeys(("running", "tokens"), st.integers(0, MAX_COUNT))
        fields |= dict.fromkeys(("busy_s", "weights_s", "wall_s"), st.floats(0, MAX_COUNT))
    if record is Hello:
        fields["holds"] = fields["holds"].map(lambda holds: holds[: len(holds) // 2 * 2])
    if record is Shard:
        fields["rollouts"] = st.lists(rollouts().map(for_training), max_size=3).map(tuple)
    return st.fixed_dictionaries(fields).map(lambda fields: record(**fields))


def for_training(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, purpose="train", reward=0.0)


messages = st.sampled_from(RECORDS).flatmap(records_of)


def one_rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "task": 1,
        "attempt": 0,
        "slot": 2,
        "purpose": "train",
        "guided": False,
        "prompt": np.array([1, 2], np.int32),
        "tokens": np.array([3, 4, 5], np.int32),
        "logprobs": np.array([-1, -2, -3], np.float32),
        "versions": np.array([7, 8], np.int32),
        "digests": np.array([-7, 2**40], np.int64),
        "ends": np.array([1, 3], np.int32),
        "reward": 1.0,
        "finish": "stop",
    }
    return Rollout(**fields | changes)


def header(frames: list[bytes]) -> dict[str, Any]:
    return msgpack.unpackb(frames[0][len(VERSION) :])


def with_header(frames: list[bytes], changes: dict[str, Any]) -> list[bytes]:
    return [VERSION + msgpack.packb(header(frames) | changes), *frames[1:]]


def test_every_record_is_a_message() -> None:
    defined = {item for item in vars(records).values() if isinstance(item, type)}
    assert set(RECORDS) | PARTS == {item for item in defined if dataclasses.is_dataclass(item)}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_record_survives_a_round_trip(record: type) -> None:
    @settings(max_examples=30, deadline=None)
    @given(message=records_of(record))
    def check(message: Message) -> None:
        assert same(decode(encode(message), max_bytes=LIMIT), message)

    check()


def test_arrays_are_read_only_views_of_the_frames() -> None:
    frames = encode(one_rollout())
    rollout = decode(frames, max_bytes=LIMIT)
    assert isinstance(rollout, Rollout)
    assert np.shares_memory(rollout.tokens, np.frombuffer(frames[1], np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        rollout.tokens[0] = 9


def test_arrays_are_read_only_even_if_the_frames_are_writable() -> None:
    frames = [memoryview(bytearray(frame)) for frame in encode(one_rollout())]
    rollout = decode(frames, max_bytes=LIMIT)
    assert isinstance(rollout, Rollout)
    assert not rollout.tokens.flags.writeable


def test_decoded_arrays_and_views_of_them_are_sent_on() -> None:
    frames = encode(one_rollout())
    rollout = decode(frames, max_bytes=LIMIT)
    assert isinstance(rollout, Rollout)
    assert encode(rollout) == frames
    turned = dataclasses.replace(rollout, tokens=rollout.tokens[::-1], prompt=rollout.prompt[1:])
    assert same(decode(encode(turned), max_bytes=LIMIT), turned)


def test_every_array_begins_at_a_multiple_of_eight_bytes() -> None:
    """So that NumPy and torch may compute with it in place."""
    rollout = one_rollout(prompt=i4(1), tokens=i4(3, 4, 5), **TOP)
    header, arrays = encode(rollout)
    decoded = decode([header, arrays], max_bytes=LIMIT)
    begin = np.frombuffer(arrays, np.uint8).__array_interface__["data"][0]
    places = [
        value.__array_interface__["data"][0] - begin
        for value in vars(decoded).values()
        if isinstance(value, np.ndarray)
    ]
    assert places == [0, 8, 24, 40, 48, 64, 72, 96]
    assert len(arrays) == 120


def test_the_fields_of_a_header_may_be_in_any_order() -> None:
    header, *buffers = encode(one_rollout())
    plain = msgpack.unpackb(header[len(VERSION) :])
    turned = VERSION + msgpack.packb(dict(reversed(plain.items())))
    assert turned != header
    assert same(decode([turned, *buffers], max_bytes=LIMIT), one_rollout())


@pytest.mark.parametrize("version", [0, PROTOCOL + 1, 127, 2**40, -5])
@pytest.mark.parametrize("rest", [b"", b"\xc1 no MessagePack", b"\x80"])
def test_another_protocol_version_is_reported_before_any_other_error(version: int, rest: bytes) -> None:
    with pytest.raises(ProtocolMismatch, match=f"version {version}, this side {PROTOCOL}"):
        decode([msgpack.packb(version) + rest, b"frame"], max_bytes=LIMIT)


@pytest.mark.parametrize(
    "start", [b"", b"\xc0", b"\xc3", b"\xcc", b"\xa1x", b"\x90", b"\xcc" + VERSION + b"\x80", b"\xdd\xff\xff\xff\xff"]
)
def test_a_header_without_a_protocol_version_is_rejected(start: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode([start], max_bytes=LIMIT)
    assert type(caught.value) is WireError


CHANGES: list[tuple[str, Any]] = [
    ("task", True),
    ("task", 1.0),
    ("task", "1"),
    ("task", None),
    ("task", 2**63),
    ("guided", 1),
    ("reward", 1),
    ("purpose", "play"),
    ("finish", None),
    ("tokens", 2),
    ("tokens", 4),
    ("tokens", -1),
    ("tokens", 2**62),
    ("tokens", 2**64 - 1),
    ("tokens", True),
    ("tokens", 3.0),
    ("prompt", 1),
    ("prompt", 3),
    ("versions", 1),
    ("tokens", [3]),
    ("digests", 3),
    ("ends", 40),
    ("tokens", None),
    ("surplus", 1),
    ("kind", "Ack"),
    ("kind", "Nothing"),
    ("kind", 7),
]


@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_a_field_of_a_wrong_type_or_value_is_rejected(field: str, value: Any) -> None:
    frames = with_header(encode(one_rollout()), {field: value})
    with pytest.raises(WireError):
        decode(frames, max_bytes=LIMIT)


def test_the_error_names_a_missing_field() -> None:
    plain = header(encode(Ack(task=1, attempt=2, slot=3)))
    del plain["slot"]
    with pytest.raises(WireError, match=r"Ack: missing or unknown fields slot"):
        decode([VERSION + msgpack.packb(plain)], max_bytes=LIMIT)


def i4(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


INCONSISTENT: list[dict[str, Any]] = [
    {"tokens": i4(), "logprobs": np.empty(0, np.float32), "ends": i4(0), "versions": i4(1)},
    {"prompt": i4()},
    {"logprobs": np.zeros(2, np.float32)},
    {"versions": i4(1)},
    {"versions": i4(), "ends": i4()},
]
IMPOSSIBLE: list[dict[str, Any]] = [
    {"logprobs": np.array([0, np.nan, 0], np.float32)},
    {"ends": i4(0, 3)},
    {"ends": i4(4, -3)},
    {"tokens": i4(1, -1, 2)},
    {"versions": i4(-1, 1)},
    {"reward": float("inf")},
    {"reward": float("nan")},
    {"guided": True},
    {"unguided_logprob": float("nan")},
]
TOP = {"guided": True, "unguided_logprob": -1.0, "top_tokens": i4(*range(6)), "top_logprobs": np.zeros(6, np.float32)}


def test_top_logprobs_survive_a_round_trip() -> None:
    rollout = one_rollout(**TOP)
    assert same(decode(encode(rollout), max_bytes=LIMIT), rollout)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_logprobs": None},
        {"top_tokens": None},
        {"top_tokens": i4(1, 2, 3, 4), "top_logprobs": np.zeros(4, np.float32)},
        {"top_tokens": i4(1, 2, 3)},
        {"top_tokens": i4(), "top_logprobs": np.empty(0, np.float32)},
    ],
    ids="+".join,
)
def test_inconsistent_top_logprobs_are_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="top"):
        encode(one_rollout(**TOP | changes))


@pytest.mark.parametrize("changes", INCONSISTENT, ids="+".join)
def test_sender_and_receiver_reject_an_inconsistent_rollout(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = one_rollout(**changes)
    with pytest.raises(WireError, match="Rollout"):
        encode(rollout)
    with monkeypatch.context() as careless:
        careless.setattr(PLANS["Rollout"], "invalid_reason", None)
        frames = encode(rollout)
    with pytest.raises(WireError, match="Rollout"):
        decode(frames, max_bytes=LIMIT)


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids="+".join)
def test_impossible_numbers_arrive_so_that_the_hub_can_end_the_lease(changes: dict[str, Any]) -> None:
    decoded = decode(encode(one_rollout(**changes)), max_bytes=LIMIT)
    assert isinstance(decoded, Rollout) and (decoded.task, decoded.attempt, decoded.slot) == (1, 0, 2)


@pytest.mark.parametrize(
    "message",
    [
        Ack(task=np.int64(1), attempt=0, slot=0),
        Ack(task=2**63, attempt=0, slot=0),
        Settings(settings={"a": (1, 2)}),
        Settings(settings={"a": np.float32(1)}),
        Settings(settings={1: "a"}),
        Settings(settings={"a": 2**64}),
        Settings(settings={"a": "\ud800"}),
        Committed(step=1, status={"text": "x" * MAX_HEADER}),
        Restore(state=bytearray(b"x")),
        one_rollout(tokens=np.array([3, 4, 5], np.int64)),
        one_rollout(tokens=[3, 4, 5]),
        Shard(step=1, version=1, problems=1, rollouts=[one_rollout()]),
        Shard(step=1, version=1, problems=1, rollouts=(Ack(task=1, attempt=1, slot=1),)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_encoding_an_invalid_message_raises_at_the_sender(message: Message) -> None:
    with pytest.raises(WireError, match=type(message).__name__):
        encode(message)


def test_lost_duplicated_swapped_and_trailing_frames_are_rejected() -> None:
    good = encode(one_rollout())
    bad = [
        [],
        good[:1],
        good[1:],
        [*good, b""],
        [good[0], *good],
        [good[1], good[0]],
        [good[0], good[1][:-1]],
        [good[0], good[1][:-8]],
        [good[0], good[1] + bytes(8)],
        [good[0], b""],
    ]
    for frames in bad:
        with pytest.raises(WireError):
            decode(frames, max_bytes=LIMIT)


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {"task": 1, "attempt": 0, "purpose": "train", "problem": "p", "answer": "a"}
    fields |= {"verifier": "math", "strategy": None, "autonomous": 1, "guided": 0, "min_version": 0, "seed": 0}
    return Lease(**fields | {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8} | changes)


@pytest.mark.parametrize(
    ("kept", "sizes", "reason"),
    [
        ([1, 2], None, "kept and kept_sizes must come together"),
        (None, [1, 1, 0], "kept and kept_sizes must come together"),
        ([1, 2], [1, 1], "kept_sizes must hold"),
        ([1, 2], [1, 0, 0], "kept_sizes must hold"),
        ([1, 2], [3, -1, 0], "kept_sizes must hold"),
        ([], [2**31 - 1, 2**31 - 1, 2], "kept_sizes must hold"),
    ],
)
def test_kept_tokens_without_their_numbers_are_rejected(
    kept: list[int] | None, sizes: list[int] | None, reason: str
) -> None:
    arrays = {
        name: None if own is None else np.array(own, np.int32) for name, own in (("kept", kept), ("kept_sizes", sizes))
    }
    with pytest.raises(WireError, match=reason):
        encode(one_rollout(**arrays))
    part = PartialRollout(
        slot=0, start=0, tokens=np.zeros(3, np.int32), logprobs=np.zeros(3, np.float32), ends=np.array([3], np.int32),
        versions=np.zeros(1, np.int32),
        digests=np.zeros(1, np.int64), **arrays,
    )  # fmt: skip
    with pytest.raises(WireError, match=reason):
        encode(Progress(task=1, attempt=0, purpose="train", partial=(part,)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "x" * 2**20}, "state: expected one of .*, got str 'x{60}'$"),
        ({"state": "draining"}, "state: expected one of "),
        ({"wall_s": math.nan}, r"wall_s must be in \[0, 2\^53\], got nan"),
        ({"busy_s": math.inf}, r"busy_s must be in \[0, 2\^53\], got inf"),
        ({"weights_s": -0.5}, r"weights_s must be in \[0, 2\^53\], got -0.5"),
        ({"running": -1}, r"running must be in \[0, 2\^53\], got -1"),
        ({"tokens": 2**53 + 1}, r"tokens must be in \[0, 2\^53\], got 9007199254740993"),
        ({"tasks": np.zeros(MAX_HELD + 1, np.int32)}, "tasks must hold at most 65536 numbers, got 65537"),
    ],
)
def test_a_heartbeat_that_the_hub_cannot_use_is_rejected(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        encode(Heartbeat(**changes))


def test_a_list_of_held_leases_has_a_limit() -> None:
    most = Hello(role="actor", name="a", holds=np.zeros(2 * MAX_HELD, np.int32))
    assert encode(most)
    with pytest.raises(WireError, match="holds must be at most 65536 pairs, got 131074 numbers"):
        encode(dataclasses.replace(most, holds=np.zeros(2 * MAX_HELD + 2, np.int32)))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"top_logprobs_num": -1},
        {"turns": -1},
    ],
)
def test_a_lease_with_invalid_sampling_parameters_is_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError, match=f"{next(iter(changes))} must be "):
        encode(lease(purpose="evaluate", **changes))


def test_a_shard_with_an_evaluation_rollout_is_rejected() -> None:
    rollouts = (one_rollout(), one_rollout(task=7, purpose="evaluate"))
    with pytest.raises(WireError, match="rollouts must be for training, got task 7 for evaluate"):
        encode(Shard(step=1, version=8, problems=2, rollouts=rollouts))


def test_a_message_larger_than_max_bytes_is_rejected() -> None:
    frames = encode(one_rollout())
    size = sum(map(len, frames))
    assert decode(frames, max_bytes=size)
    with pytest.raises(WireError, match=f"message of {size} bytes is larger than {size - 1}; raise hub.max_message_mb"):
        decode(frames, max_bytes=size - 1)


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\x00\x0f\xff\xff" * 1000,  # lists of a million elements, a thousand deep
        b"\xdd\x00\x00\x12\x00" * 1000,  # a thousand lists of 4,608 elements: less than the header's 5,000 bytes
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdc\x01\xf0" * 165,  # short enough to be read at once
        b"\xdc\x7f\xff" * 11_000,
        b"\x91" * 100_000,
        b"\x81\xa4kind" + b"\x91" * 900 + b"\xc0",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc7\x00\x05",
        b"\x81\x90\xc0",
        b"\xa1\xff",
    ],
)
def test_false_lengths_in_a_header_allocate_no_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode([VERSION + body], max_bytes=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_larger_than_its_limit_is_rejected() -> None:
    with pytest.raises(WireError, match=f"header of .* bytes is larger than {MAX_HEADER}"):
        decode([VERSION + b"\x80" * (MAX_HEADER + 1)], max_bytes=2 * MAX_HEADER)


def test_plain_data_nested_too_deeply_is_rejected() -> None:
    nested: dict[str, Any] = {}
    for _ in range(200):
        nested = {"inner": nested}
    with pytest.raises(WireError, match="nested deeper"):
        encode(Settings(settings=nested))
    hostile = with_header(encode(Settings(settings={})), {"settings": nested})
    with pytest.raises(WireError, match="nested deeper"):
        decode(hostile, max_bytes=LIMIT)


LIST, MAP, BIN_KEYED_MAP = b"\x91", b"\x81\xa1k", b"\x81\xc4\x01k"
LEAVES = (
    b"\xc0",
    b"\x07",
    b"\x90",
    b"\x80",
    b"\xa1k",
    b"\xc4\x01k",
    b"\xc7\x01\x05k",
    b"\xd6\xff\x00\x00\x00\x00",
    b"",
)


@contextmanager
def little_stack() -> Iterator[None]:
    """Within this context Python may recurse by 200 more calls; Hypothesis allows thousands."""
    before, frame, depth = sys.getrecursionlimit(), sys._getframe(), 0
    while frame := frame.f_back:
        depth += 1
    sys.setrecursionlimit(depth + 200)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@settings(max_examples=300, deadline=None)
@given(
    message=messages,
    levels=st.lists(st.sampled_from((LIST, MAP, BIN_KEYED_MAP)), min_size=1, max_size=3),
    depth=st.sampled_from((1, 31, 33, 39, 41, 300, 900, 1020, 1025, 5_000, 100_000)),
    leaf=st.sampled_from(LEAVES),
    data=st.data(),
)
def test_nested_data_in_any_field_is_rejected_or_a_valid_message(
    message: Message, levels: list[bytes], depth: int, leaf: bytes, data: st.DataObject
) -> None:
    frames = encode(message)
    plain = header(frames)
    field = data.draw(st.sampled_from([*plain, "surplus"]))
    nested = (levels * depth)[:depth]
    entries = {name: msgpack.packb(value) for name, value in plain.items()} | {field: b"".join(nested) + leaf}
    body = b"\xde" + len(entries).to_bytes(2, "big") + b"".join(msgpack.packb(name) + entries[name] for name in entries)
    with little_stack():
        check_decoded_or_rejected([VERSION + body, *frames[1:]])


@pytest.mark.parametrize("opening", [LIST, MAP, BIN_KEYED_MAP])
@pytest.mark.parametrize("depth", [MAX_LEVELS + 1, 500, 1000])
@pytest.mark.parametrize("kind", ["Ack", "Rollout", "Settings", None])
def test_a_header_nested_more_deeply_than_any_message_is_rejected(opening: bytes, depth: int, kind: str | None) -> None:
    start = b"\x81\xa4kind" if kind is None else b"\x82\xa4kind" + msgpack.packb(kind) + b"\xa4task"
    with pytest.raises(WireError, match=f"header is nested deeper than {MAX_LEVELS} levels"):
        decode([VERSION + start + opening * depth + b"\xc0"], max_bytes=LIMIT)


@pytest.mark.parametrize("levels", [1, MAX_DEPTH])
def test_plain_data_as_deep_as_a_sender_may_nest_it_arrives(levels: int) -> None:
    """In the deepest place that there is: a record of a tuple."""
    nested: dict[str, Any] = {}
    for _ in range(levels):
        nested = {"inner": nested}
    score = BenchmarkScore(name="own", avg=None, low=None, high=None, samples=1, problems=0, results=nested)
    message = Evaluated(
        version=1, pass_auto=0.0, pass_guided=0.0, problems=1, served_oldest=1, served_newest=1, lag=0.0,
        benchmarks=(score,),
    )  # fmt: skip
    assert same(decode(encode(message), max_bytes=LIMIT), message)


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x" * 10**7, "str '" + "x" * 60 + "'"),
        (b"x" * 10**7, "bytes b'" + "x" * 60 + "'"),
        (DEEP, "list of length 1"),
        ({"a": DEEP}, "dict of length 1"),
        ((DEEP,), "tuple of length 1"),
        (7, "int '7'"),
        (-(10**6000), "int of 19932 bits"),
        (0.5, "float '0.5'"),
        (None, "NoneType 'None'"),
        (np.zeros(9), "ndarray of length 9"),
        (np.dtype("<i8"), "'int64'"),
        (object(), "object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_in_an_error_is_short_whatever_it_is(value: Any, text: str) -> None:
    assert str(unexpected("Ack.task", "an int", value)).endswith(text)


def test_names_of_unknown_fields_in_an_error_are_short() -> None:
    plain: dict[Any, Any] = {"kind": "StatusRequest"} | {f"{number:0100000d}": 0 for number in range(9)} | {b"bytes": 0}
    with pytest.raises(WireError) as caught:
        decode([VERSION + msgpack.packb(plain)], max_bytes=LIMIT)
    assert len(str(caught.value)) < 200


def mutate(frames: list[bytes], dice: random.Random) -> list[bytes]:
    """The frames after one random mutation."""
    frames = list(frames)
    at = dice.randrange(len(frames))
    frame = bytearray(frames[at])
    match dice.randrange(7):
        case 0 if frame:
            frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
        case 1:
            del frame[dice.randint(0, len(frame)) :]
        case 2:
            frame += dice.randbytes(dice.randint(1, 9))
        case 3 if frame:
            start = dice.randrange(len(frame))
            frame[start : start + 5] = dice.randbytes(5)
        case 4:
            del frames[at]
            return frames
        case 5:
            frames.insert(at, dice.randbytes(dice.randint(0, 12)))
            return frames
        case _:
            frames[at], frames[0] = frames[0], frames[at]
            return frames
    frames[at] = bytes(frame)
    return frames


def check_decoded_or_rejected(frames: list[bytes]) -> None:
    """Check that decoding gives a valid message or raises WireError."""
    try:
        message = decode(frames, max_bytes=LIMIT)
    except WireError:
        return
    encode(message)


@settings(max_examples=250, deadline=None)
@given(message=messages, dice=st.randoms(use_true_random=False), mutations=st.integers(1, 4))
def test_mutated_frames_are_rejected_or_a_valid_message(message: Message, dice: random.Random, mutations: int) -> None:
    frames = encode(message)
    for _ in range(mutations):
        frames = mutate(frames, dice) or [b""]
    check_decoded_or_rejected(frames)


@settings(max_examples=200, deadline=None)
@given(message=messages, value=PLAIN | st.binary() | st.integers(2**63, 2**64 - 1), data=st.data())
def test_any_value_in_any_field_is_rejected_or_a_valid_message(
    message: Message, value: Any, data: st.DataObject
) -> None:
    frames = encode(message)
    field = data.draw(st.sampled_from(sorted(header(frames))))
    check_decoded_or_rejected(with_header(frames, {field: value}))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=4), st.booleans())
def test_random_bytes_are_rejected(noise: list[bytes], versioned: bool) -> None:
    frames = [VERSION + noise[0], *noise[1:]] if versioned and noise else noise
    with pytest.raises(WireError):
        decode(frames, max_bytes=LIMIT)


def test_a_message_without_fields_survives_a_round_trip() -> None:
    assert decode(encode(StatusRequest()), max_bytes=LIMIT) == StatusRequest()

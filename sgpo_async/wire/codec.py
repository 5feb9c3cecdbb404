"""Encode messages into frames and decode them.

    first frame    MessagePack of PROTOCOL, then MessagePack of {"kind": "Rollout", field: value, ...}
    second frame   array and bytes fields, little-endian, each filled up to 8 bytes; absent if it would be empty

One frame for all arrays, because every frame costs sender and receiver about as much as an array. Encoding copies all
arrays into it; as long as one decoded array is referenced, the whole frame stays in memory. An empty one is accepted.

`decode` compares the protocol version before it reads anything else. It then walks through a header that is not `SHORT`
without building objects, so that a length that the header claims but does not hold allocates no memory. It limits the
header's size (`MAX_HEADER`), so that what the header does hold allocates little, and its depth (`MAX_LEVELS`), so that
no later check meets a value that Python cannot compare or format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast, get_args, get_origin, get_type_hints

import msgpack

from sgpo_async.errors import ProtocolMismatch, WireError
from sgpo_async.wire.fields import MAX_DEPTH, Arrays, Buffers, Field, RecordTuple, field_of, unexpected
from sgpo_async.wire.records import PROTOCOL, Message
from sgpo_async.wire.rules import RULES

PREFIX = msgpack.packb(PROTOCOL)
MAX_HEADER = (
    4 * 2**20
)  # bytes: enough for a shard of 20,000 rollouts; a header of empty maps would take 70 times this memory when built
SHORT = 512  # bytes; a claimed length is at most that of the header, so a short one claims less than 1 MB on all levels
MAX_LEVELS = MAX_DEPTH + 8  # of nested lists and maps: plain data in a record of a tuple is the deepest
CONTAINERS = frozenset({list, dict})  # that `msgpack.unpackb` makes
BROKEN = (ValueError, msgpack.UnpackException)  # what msgpack raises for bytes that are not MessagePack


class RecordPlan:
    """The fields of one record class, in the order of their definition."""

    def __init__(self, record: type, where: str = "message") -> None:
        hints = get_type_hints(record, include_extras=True)
        self.where = where
        self.record = record
        self.name = record.__name__
        self.fields: dict[str, Field] = {
            field.name: plan_field(hints[field.name], f"{self.name}.{field.name}") for field in fields(record)
        }
        self.names = list(self.fields)
        self.dumps = [(name, field.dump) for name, field in self.fields.items()]
        self.loads = [field.load for field in self.fields.values()]
        self.invalid_reason = RULES.get(record)

    def check(self, message: Any) -> None:
        if self.invalid_reason and (reason := self.invalid_reason(message)):
            raise WireError(f"{self.name}: {reason}")

    def dump(self, message: Any, buffers: Buffers) -> dict[str, Any]:
        if type(message) is not self.record:
            raise unexpected(self.where, self.name, message)
        values = message.__dict__
        plain = {name: dump(values[name], buffers) for name, dump in self.dumps}
        self.check(message)
        return plain

    def load(self, plain: Any, arrays: Arrays) -> Any:
        if type(plain) is not dict:
            raise unexpected(self.where, f"map of {self.name}", plain)
        if list(plain) != self.names:
            plain = self.in_order(plain)
        values = [load(value, arrays) for load, value in zip(self.loads, plain.values(), strict=True)]
        message: Any = object.__new__(self.record)  # without __init__, which would set every field by itself
        message.__dict__.update(zip(self.names, values, strict=True))
        self.check(message)
        return message

    def in_order(self, plain: dict[Any, Any]) -> dict[str, Any]:
        """The same fields in the order of their definition. Raises WireError if they are not the record's."""
        if plain.keys() != self.fields.keys():
            differing = plain.keys() ^ self.fields.keys()
            # A name from elsewhere may hold characters that would change a terminal.
            names = sorted(key if str(key).isidentifier() else ascii(key) for key in differing)
            raise WireError(f"{self.name}: missing or unknown fields {', '.join(names[:8])[:80]}")
        return {name: plain[name] for name in self.names}


def plan_field(annotation: Any, where: str) -> Field:
    """The encoder and decoder of one field: of a tuple of records, or of a value without records."""
    if get_origin(annotation) is tuple:
        return RecordTuple(where, RecordPlan(get_args(annotation)[0], where))
    return field_of(annotation, where)


PLANS = {record.__name__: RecordPlan(record) for record in get_args(Message)}


def encode(message: Message) -> list[bytes]:
    """The frames of a message.

    Raises:
        WireError: a field holds a value that its annotation does not allow, or the message breaks a rule.
    """
    plan = PLANS[type(message).__name__]
    buffers: Buffers = []
    plain = plan.dump(message, buffers)
    try:
        header = msgpack.packb({"kind": plan.name, **plain})
    except (ValueError, OverflowError) as error:  # a str with lone surrogates, an int beyond 64 bits
        raise WireError(f"{plan.name}: {error}") from error
    if len(header) > MAX_HEADER:
        raise WireError(f"{plan.name}: header of {len(header)} bytes is larger than {MAX_HEADER}")
    arrays = b"".join(buffers)
    return [PREFIX + header, arrays] if arrays else [PREFIX + header]


def decode(frames: Sequence[bytes | memoryview], *, max_bytes: int) -> Message:
    """The message in `frames`; its arrays are read-only views of the second frame.

    Raises:
        ProtocolMismatch: the sender uses another protocol version.
        WireError: the frames are invalid in any other way.
    """
    size = sum(map(len, frames))
    if size > max_bytes:
        raise WireError(f"message of {size} bytes is larger than {max_bytes}; raise hub.max_message_mb")
    if not 1 <= len(frames) <= 2:
        raise WireError(f"message must have one or two frames, got {len(frames)}")
    plain = read_header(bytes(frames[0]))
    kind = plain.pop("kind", None)
    plan = PLANS.get(kind) if type(kind) is str else None
    if plan is None:
        raise WireError("unknown kind of message")
    arrays = Arrays(frames[1] if len(frames) == 2 else b"")
    message = plan.load(plain, arrays)
    if arrays.taken != arrays.size:
        raise WireError(f"{plan.name}: its fields have {arrays.taken} bytes, its second frame {arrays.size}")
    return cast(Message, message)


def read_header(header: bytes) -> dict[Any, Any]:
    """The map in a header. Raises ProtocolMismatch or WireError."""
    if not header.startswith(PREFIX):
        raise version_error(header)
    if len(header) > MAX_HEADER + len(PREFIX):
        raise WireError(f"header of {len(header)} bytes is larger than {MAX_HEADER}")
    body = header[len(PREFIX) :]
    try:
        if len(body) > SHORT:
            skim(body)
        plain = msgpack.unpackb(body, max_ext_len=0)
    except BROKEN as error:
        raise WireError(f"header is not MessagePack: {str(error) or type(error).__name__}") from error
    if nested_deeper(plain, MAX_LEVELS):
        raise WireError(f"header is nested deeper than {MAX_LEVELS} levels")
    if type(plain) is not dict:
        raise unexpected("header", "map", plain)
    return plain


def nested_deeper(value: Any, limit: int) -> bool:
    """Whether lists and maps are nested more than `limit` levels deep; looks level by level, without recursion."""
    level = [value] if type(value) in CONTAINERS else []
    for _ in range(limit):
        level = [
            inner
            for container in level
            for inner in (container.values() if type(container) is dict else container)
            if type(inner) in CONTAINERS
        ]
        if not level:
            return False
    return True


def skim(body: bytes) -> None:
    """Walk through one MessagePack object without building it; raises one of `BROKEN` if it is incomplete."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(body), 1))
    unpacker.feed(body)
    unpacker.skip()


def version_error(header: bytes) -> WireError:
    """The error for a header that does not begin with this side's protocol version."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=16, max_str_len=0, max_bin_len=0, max_array_len=0, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(header[:9])  # the longest integer
    try:
        version = unpacker.unpack()
    except BROKEN:
        version = None
    if type(version) is not int or version == PROTOCOL:
        return WireError("message does not begin with a protocol version")
    return ProtocolMismatch(
        f"protocol: the other side uses version {version}, this side {PROTOCOL}; install the same sgpo-async on both"
    )

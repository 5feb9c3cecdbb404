"""Messages to frames and back.

    frame 0      MessagePack of PROTOCOL, then MessagePack of {"kind": "Rollout", field: value, ...}
    frame 1..n   the raw little-endian buffers that array fields point to, in order

The protocol version is compared before anything else is looked at. The header is then skimmed without
building anything, so that a length it claims but does not hold costs nothing, and it is small (`MAX_HEADER`),
so that what it does hold costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast, get_args, get_origin, get_type_hints

import msgpack

from sgpo_async.errors import ProtocolMismatch, WireError
from sgpo_async.wire.fields import Field, Frames, Many, leaf_field, misfit
from sgpo_async.wire.records import PROTOCOL, Message
from sgpo_async.wire.rules import FAULTS

PREFIX = msgpack.packb(PROTOCOL)
MAX_HEADER = 4 * 2**20  # bytes: a shard of some 20,000 rollouts; empty maps would grow 70-fold when built
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
        self.fault = FAULTS.get(record)

    def check(self, message: Any) -> None:
        if self.fault and (fault := self.fault(message)):
            raise WireError(f"{self.name}: {fault}")

    def dump(self, message: Any, buffers: list[bytes]) -> dict[str, Any]:
        if type(message) is not self.record:
            raise misfit(self.where, self.name, message)
        plain = {name: field.dump(getattr(message, name), buffers) for name, field in self.fields.items()}
        self.check(message)
        return plain

    def load(self, plain: Any, frames: Frames) -> Any:
        if type(plain) is not dict:
            raise misfit(self.where, f"map of {self.name}", plain)
        if plain.keys() != self.fields.keys():
            odd = sorted(map(str, plain.keys() ^ self.fields.keys()))
            raise WireError(f"{self.name}: missing or unknown fields {', '.join(odd)[:80]}")
        values = {name: field.load(plain[name], frames) for name, field in self.fields.items()}
        message = self.record(**values)
        self.check(message)
        return message


def plan_field(annotation: Any, where: str) -> Field:
    """The way of one field: a tuple of records, or something that holds no record."""
    if get_origin(annotation) is tuple:
        return Many(where, RecordPlan(get_args(annotation)[0], where))
    return leaf_field(annotation, where)


PLANS = {record.__name__: RecordPlan(record) for record in get_args(Message)}


def encode(message: Message) -> list[bytes]:
    """The frames of a message.

    Raises:
        WireError: a field holds what its annotation does not allow.
    """
    plan = PLANS[type(message).__name__]
    buffers: list[bytes] = []
    plain = plan.dump(message, buffers)
    try:
        header = msgpack.packb({"kind": plan.name, **plain})
    except (ValueError, OverflowError) as error:  # a str with lone surrogates, an int beyond 64 bits
        raise WireError(f"{plan.name}: {error}") from error
    if len(header) > MAX_HEADER:
        raise WireError(f"{plan.name}: header of {len(header)} bytes, the limit is {MAX_HEADER}")
    return [PREFIX + header, *buffers]


def decode(frames: Sequence[bytes | memoryview], *, max_bytes: int) -> Message:
    """The message that stands in `frames`; its arrays are read-only views of them.

    Raises:
        ProtocolMismatch: the other side speaks another version.
        WireError: anything else that is wrong with the frames.
    """
    size = sum(len(frame) for frame in frames)
    if size > max_bytes:
        raise WireError(f"message of {size} bytes is larger than {max_bytes} (hub.max_message_mb)")
    if not frames:
        raise WireError("message without frames")
    plain = read_header(bytes(frames[0]))
    plan = PLANS.get(str(plain.pop("kind", None)))
    if plan is None:
        raise WireError("unknown kind of message")
    buffers = Frames(frames[1:])
    message = plan.load(plain, buffers)
    if buffers.taken != len(buffers.buffers):
        raise WireError(f"{plan.name}: {len(buffers.buffers) - buffers.taken} trailing frames")
    return cast(Message, message)


def read_header(header: bytes) -> dict[Any, Any]:
    """The map of a header whose version is ours."""
    if not header.startswith(PREFIX):
        raise other_protocol(header)
    if len(header) > MAX_HEADER + len(PREFIX):
        raise WireError(f"header of {len(header)} bytes, the limit is {MAX_HEADER}")
    body = header[len(PREFIX) :]
    try:
        skim(body)
        plain = msgpack.unpackb(body, max_ext_len=0)
    except BROKEN as error:
        raise WireError(f"header is not MessagePack: {str(error) or type(error).__name__}") from error
    if type(plain) is not dict:
        raise misfit("header", "map", plain)
    return plain


def skim(body: bytes) -> None:
    """Walk through one MessagePack object without building it; raises if it is not whole."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(body), 1))
    unpacker.feed(body)
    unpacker.skip()


def other_protocol(header: bytes) -> WireError:
    """The error for a header that does not begin with our version."""
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
        f"protocol: the other side speaks version {version}, this side {PROTOCOL}; "
        "install the same sgpo-async on both"
    )

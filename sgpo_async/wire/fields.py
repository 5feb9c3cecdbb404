"""How one field of a record is encoded. The annotation decides; sender and receiver both check the value.

    annotation               in the MessagePack header               in frames of its own
    int float str bool       the value
    Literal["a", "b"]        the value
    T | None                 nil or T
    dict[str, Any]           nested maps and lists of plain values
    Tokens Ints Floats ...   [frame index, dtype, [length]]          the little-endian buffer
    bytes                    [frame index, "|u1", [length]]          the bytes
    tuple[Record, ...]       a list of maps                          their buffers, in order

`dump` returns the part of the header for a value and appends buffers; `load` is its inverse and checks everything that
it reads. Both raise a WireError that names record and field. Types are exact: a bool is not accepted as an int.
"""

from __future__ import annotations

import types
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

import numpy as np

from sgpo_async.errors import WireError

INT64 = 2**63
MAX_DEPTH = 32  # of nested plain data in one field
LEAVES = frozenset({type(None), bool, int, float, str})


class Frames:
    """The buffer frames of a message that is being decoded; fields take them in order, each exactly once."""

    def __init__(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.buffers = buffers
        self.taken = 0


class Field(Protocol):
    """Encoder and decoder of one field."""

    def dump(self, value: Any, buffers: list[bytes]) -> Any: ...

    def load(self, plain: Any, frames: Frames) -> Any: ...


def unexpected(where: str, expected: str, value: object) -> WireError:
    """The error for a value of another type or form than expected."""
    return WireError(f"{where}: expected {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A value of a peer for an error: its type, and of text and numbers at most 60 characters.

    It never formats a container, which may be nested more deeply than Python can format.
    """
    kind = type(value).__name__
    if isinstance(value, str | bytes):
        return f"{kind} {value[:60]!r}"
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to format very long integers
        return f"{kind} of {value.bit_length()} bits"
    if type(value) in LEAVES or isinstance(value, np.generic | np.dtype):
        return f"{kind} {str(value)[:60]!r}"
    return f"{kind} of length {len(value)}" if isinstance(value, Sized) else kind


@dataclass(frozen=True)
class Scalar:
    """A bool or a str, of exactly this type."""

    where: str
    kind: type

    def load(self, value: Any, _other: Any) -> Any:
        if type(value) is not self.kind:
            raise unexpected(self.where, self.kind.__name__, value)
        return value

    dump = load


class Integer(Scalar):
    """A signed 64-bit integer."""

    def load(self, value: Any, _other: Any) -> Any:
        if type(value) is not int or not -INT64 <= value < INT64:
            raise unexpected(self.where, "a 64-bit int", value)
        return value

    dump = load


class Real(Scalar):
    """A float; the sender may also pass an int or a NumPy float64."""

    def dump(self, value: Any, buffers: list[bytes]) -> Any:
        return float(value) if isinstance(value, float) or type(value) is int else self.load(value, buffers)


@dataclass(frozen=True)
class Choice:
    """One of the values of a Literal."""

    where: str
    choices: tuple[str, ...]

    def dump(self, value: Any, _buffers: list[bytes]) -> Any:
        if type(value) is not str or value not in self.choices:
            raise unexpected(self.where, f"one of {', '.join(self.choices)}", value)
        return value

    def load(self, plain: Any, _frames: Frames) -> Any:
        return self.dump(plain, [])


@dataclass(frozen=True)
class Optional:
    """A field that may be None."""

    inner: Field

    def dump(self, value: Any, buffers: list[bytes]) -> Any:
        return None if value is None else self.inner.dump(value, buffers)

    def load(self, plain: Any, frames: Frames) -> Any:
        return None if plain is None else self.inner.load(plain, frames)


@dataclass(frozen=True)
class Plain:
    """A map from str to None, bool, int, float, str, and lists and maps of these."""

    where: str

    def check(self, value: Any, depth: int = 0) -> None:
        if type(value) in LEAVES:
            return
        if depth > MAX_DEPTH:
            raise WireError(f"{self.where}: nested deeper than {MAX_DEPTH} levels")
        if type(value) is dict:
            for key, item in value.items():
                if type(key) is not str:
                    raise unexpected(self.where, "str as key", key)
                self.check(item, depth + 1)
        elif type(value) is list:
            for item in value:
                self.check(item, depth + 1)
        else:
            raise unexpected(self.where, "plain data", value)

    def dump(self, value: Any, _buffers: list[bytes]) -> Any:
        if type(value) is not dict:
            raise unexpected(self.where, "dict", value)
        self.check(value)
        return value

    def load(self, plain: Any, _frames: Frames) -> Any:
        return self.dump(plain, [])


class Array:
    """A one-dimensional array; decoded as a read-only view of its frame."""

    def __init__(self, where: str, dtype: str) -> None:
        self.where, self.name, self.dtype = where, dtype, np.dtype(dtype)
        self.itemsize = self.dtype.itemsize

    def dump(self, value: Any, buffers: list[bytes]) -> Any:
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != self.dtype:
            raise unexpected(self.where, f"1-d array of {self.name}", getattr(value, "dtype", value))
        frame = value.base  # if it has been decoded: the hub passes most rollouts on to the learner as they are
        buffers.append(frame if type(frame) is bytes and len(frame) == value.nbytes else value.tobytes())
        return [len(buffers), self.name, [len(value)]]

    def load(self, plain: Any, frames: Frames) -> Any:
        index = frames.taken
        if index == len(frames.buffers):
            raise WireError(f"{self.where}: its frame is missing")
        frames.taken = index + 1
        buffer = frames.buffers[index]
        length, rest = divmod(len(buffer), self.itemsize)
        if rest or plain != [index + 1, self.name, [length]]:
            expected = f"[{index + 1}, '{self.name}', [{length}]] for a frame of {len(buffer)} bytes"
            raise unexpected(self.where, expected, plain)
        array = np.frombuffer(buffer, self.dtype)
        if type(buffer) is not bytes:  # those of bytes are read-only already
            array.setflags(write=False)
        return array


class Blob(Array):
    """Bytes."""

    def __init__(self, where: str) -> None:
        super().__init__(where, "|u1")

    def dump(self, value: Any, buffers: list[bytes]) -> Any:
        if type(value) is not bytes:
            raise unexpected(self.where, "bytes", value)
        return super().dump(np.frombuffer(value, self.dtype), buffers)

    def load(self, plain: Any, frames: Frames) -> Any:
        return super().load(plain, frames).tobytes()


@dataclass(frozen=True)
class RecordTuple:
    """A tuple of records of one class."""

    where: str
    inner: Field

    def dump(self, value: Any, buffers: list[bytes]) -> Any:
        if type(value) is not tuple:
            raise unexpected(self.where, "tuple", value)
        return [self.inner.dump(item, buffers) for item in value]

    def load(self, plain: Any, frames: Frames) -> Any:
        if type(plain) is not list:
            raise unexpected(self.where, "list", plain)
        return tuple(self.inner.load(item, frames) for item in plain)


def optional_of(annotation: Any) -> Any:
    """T if the annotation is `T | None`, else None."""
    if get_origin(annotation) not in (types.UnionType, Union):  # `T | None` is a Union if T is Annotated
        return None
    inner = [argument for argument in get_args(annotation) if argument is not types.NoneType]
    assert len(inner) == 1, f"a record may have fields T | None, but not {annotation}"
    return inner[0]


def field_of(annotation: Any, where: str) -> Field:
    """The encoder and decoder of a field whose annotation holds no record."""
    if inner := optional_of(annotation):
        return Optional(field_of(inner, where))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Array(where, arguments[1])
    if origin is Literal:
        return Choice(where, arguments)
    if origin is dict:
        return Plain(where)
    if annotation is bytes:
        return Blob(where)
    scalar = {int: Integer, float: Real, bool: Scalar, str: Scalar}[annotation]
    return scalar(where, annotation)

"""How one field of a record is encoded. The annotation decides; sender and receiver both check the value.

    annotation               in the MessagePack header               in the second frame
    int float str bool       the value
    Literal["a", "b"]        the value
    T | None                 nil or T
    dict[str, Any]           nested maps and lists of plain values
    Tokens Ints Floats ...   the number of items                     the items, little-endian
    bytes                    the number of bytes                     the bytes
    tuple[Record, ...]       a list of maps                          what their fields have there, in order

Bytes of PADDING fill up each value to a multiple of ALIGNED, so that arrays can be used in place. `dump` returns the
part of the header for a value and appends buffers; `load` is its inverse and checks everything that it reads. Both
raise a WireError that names record and field. Types are exact: a bool is not accepted as an int.
"""

from __future__ import annotations

import types
from collections.abc import Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

import numpy as np

from sgpo_async.errors import WireError

INT64 = 2**63
MAX_DEPTH = 32  # of nested plain data in one field
LEAVES = frozenset({type(None), bool, int, float, str})
ALIGNED = 8  # bytes: the size of the largest item
PADDING = [b"\xff" * count for count in range(ALIGNED)]  # as an int32 it is -1, which is no token id; as a float, NaN

Buffers = list[Any]  # of bytes and arrays; mypy does not know that arrays are buffers
"""What the second frame consists of, one after another."""


def append(buffers: Buffers, value: bytes | np.ndarray, size: int) -> None:
    """Add a value of `size` bytes, filled up to a multiple of ALIGNED."""
    buffers.append(value)
    if rest := size % ALIGNED:
        buffers.append(PADDING[ALIGNED - rest])


class Arrays:
    """The second frame of a message that is being decoded; fields take their parts of it in order."""

    def __init__(self, frame: bytes | memoryview) -> None:
        self.frame, self.size, self.taken = frame, len(frame), 0

    def take(self, where: str, size: object, itemsize: int) -> int:
        """Where the next `size` items of a field begin. Raises WireError unless they are there."""
        start = self.taken
        if type(size) is not int or not 0 <= size * itemsize <= self.size - start:
            raise unexpected(where, f"a number of items of {itemsize} bytes within {self.size - start} bytes", size)
        end = start + size * itemsize
        self.taken = end + -end % ALIGNED
        if self.frame[end : self.taken] != PADDING[self.taken - end]:
            raise WireError(f"{where}: its {size} items must be followed by bytes 0xff up to a multiple of {ALIGNED}")
        return start


class Field(Protocol):
    """Encoder and decoder of one field."""

    def dump(self, value: Any, buffers: Buffers) -> Any: ...

    def load(self, plain: Any, arrays: Arrays) -> Any: ...


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

    def dump(self, value: Any, buffers: Buffers) -> Any:
        return float(value) if isinstance(value, float) or type(value) is int else self.load(value, buffers)


@dataclass(frozen=True)
class Choice:
    """One of the values of a Literal."""

    where: str
    choices: tuple[str, ...]

    def dump(self, value: Any, _buffers: Buffers) -> Any:
        if type(value) is not str or value not in self.choices:
            raise unexpected(self.where, f"one of {', '.join(self.choices)}", value)
        return value

    def load(self, plain: Any, _arrays: Arrays) -> Any:
        return self.dump(plain, [])


@dataclass(frozen=True)
class Optional:
    """A field that may be None."""

    inner: Field

    def dump(self, value: Any, buffers: Buffers) -> Any:
        return None if value is None else self.inner.dump(value, buffers)

    def load(self, plain: Any, arrays: Arrays) -> Any:
        return None if plain is None else self.inner.load(plain, arrays)


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

    def dump(self, value: Any, _buffers: Buffers) -> Any:
        if type(value) is not dict:
            raise unexpected(self.where, "dict", value)
        self.check(value)
        return value

    def load(self, plain: Any, _arrays: Arrays) -> Any:
        return self.dump(plain, [])


class Array:
    """A one-dimensional array; decoded as a read-only view of the second frame."""

    def __init__(self, where: str, dtype: str) -> None:
        self.where, self.name, self.dtype = where, dtype, np.dtype(dtype)
        self.itemsize = self.dtype.itemsize

    def dump(self, value: Any, buffers: Buffers) -> Any:
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != self.dtype:
            raise unexpected(self.where, f"1-d array of {self.name}", getattr(value, "dtype", value))
        append(buffers, value if value.flags.c_contiguous else value.copy(), value.nbytes)
        return len(value)

    def load(self, plain: Any, arrays: Arrays) -> Any:
        start = arrays.take(self.where, plain, self.itemsize)
        array = np.frombuffer(arrays.frame, self.dtype, plain, start)
        if type(arrays.frame) is not bytes:  # those of bytes are read-only already
            array.setflags(write=False)
        return array


@dataclass(frozen=True)
class Blob:
    """Bytes."""

    where: str

    def dump(self, value: Any, buffers: Buffers) -> Any:
        if type(value) is not bytes:
            raise unexpected(self.where, "bytes", value)
        append(buffers, value, len(value))
        return len(value)

    def load(self, plain: Any, arrays: Arrays) -> Any:
        start = arrays.take(self.where, plain, 1)
        return bytes(arrays.frame[start : start + plain])


@dataclass(frozen=True)
class RecordTuple:
    """A tuple of records of one class."""

    where: str
    inner: Field

    def dump(self, value: Any, buffers: Buffers) -> Any:
        if type(value) is not tuple:
            raise unexpected(self.where, "tuple", value)
        return [self.inner.dump(item, buffers) for item in value]

    def load(self, plain: Any, arrays: Arrays) -> Any:
        if type(plain) is not list:
            raise unexpected(self.where, "list", plain)
        return tuple(self.inner.load(item, arrays) for item in plain)


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

"""Random changes of bytes, frames, plain values and texts. All of them need nothing but a random generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

from sgpo_async.wire.codec import PREFIX

DEEP: Any = None
for _ in range(100):
    DEEP = [DEEP]

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1,
    0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", "\0", "\n", "\x1b[2J", "\u202e", "x" * 300, "../../x", b"", b"\xff" * 9, [], {}, [[]], {"": None}, {1: 2}, DEEP,
)  # fmt: skip
BYTES = (
    0x00,
    0x01,
    0x7F,
    0x80,
    0x90,
    0xC0,
    0xC1,
    0xC6,
    0xCB,
    0xCF,
    0xD9,
    0xDD,
    0xDF,
    0xFF,
)  # some begin MessagePack types
NUMBERS = (
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
    b"\xff\xff\xff\x7f",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\0\0\x80\xff",
    b"\0\0\0\0",
)
WORDS = (
    "", "null", "true", "-1", "0", "1e400", ".nan", ".inf", "0x10", "99999999999999999999", "{", "[", "]", "}", ":",
    "- x", "&a", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "${oc.env:HOME}", "${x}", "???", "~", "'",
    '"', "|", ">", "\t", "\0", "\u2028", "é", "a: b: c", "x" * 300, "[" * 200, "{a: " * 200,
)  # fmt: skip


def changed_bytes(data: bytes, random: Random) -> bytes:
    """One to four changes: bits, bytes, numbers, and parts that are lost, doubled, moved or new."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randint(0, len(changed)), min(len(changed), 1 << random.randint(0, 6))
        match random.randrange(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.choice(BYTES)
            case 2:
                changed[at : at + 4] = random.choice(NUMBERS)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5:
                changed[at:at] = random.randbytes(length)
            case 6:
                del changed[at:]
            case _:
                there = random.randint(0, len(changed))
                changed[there:there] = changed[at : at + length]
    return bytes(changed)


def changed_plain(value: Any, random: Random) -> Any:
    """A copy with one change somewhere in nested lists and maps: a value, a key, an element more or less."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        copy = dict(value)
        key = random.choice(list(copy))
        match random.randrange(8):
            case 0:
                del copy[key]
            case 1:
                copy[random.choice(("x", "kind", "", 7, key))] = random.choice(HOSTILE)
            case 2:
                copy = dict(random.sample(list(copy.items()), len(copy)))
            case _:
                copy[key] = changed_plain(copy[key], random)
        return copy
    if isinstance(value, list) and value and random.random() < 0.9:
        copied = list(value)
        at = random.randrange(len(copied))
        match random.randrange(6):
            case 0:
                del copied[at]
            case 1:
                copied.append(copied[at])
            case 2:
                copied = copied * 50
            case _:
                copied[at] = changed_plain(copied[at], random)
        return copied
    if isinstance(value, int) and random.random() < 0.75:
        return value + random.choice((-1, 1, 2**20, -(2**20)))
    return random.choice(HOSTILE)


def changed_frames(frames: Sequence[bytes], random: Random) -> list[bytes]:
    """A message whose header, arrays or number of frames has changed."""
    changed = [bytes(frame) for frame in frames]
    at = random.randrange(len(changed))
    match random.randrange(10):
        case 0:
            changed[at] = changed_bytes(changed[at], random)
        case 1:
            changed[0] = changed_bytes(changed[0], random)
        case 2:
            del changed[at]
        case 3 if len(changed) > 1:
            place = 8 * random.randrange(1 + len(changed[-1]) // 8)
            words = random.choice((changed[-1][place : place + 8], b""))  # eight bytes twice, or not at all
            changed[-1] = changed[-1][:place] + 2 * words + changed[-1][place + 8 :]
        case 4:
            random.shuffle(changed)
        case 5 | 6 if len(changed) > 1:
            changed[-1] = _array(changed[-1], random)
        case _:
            changed[0] = _header(changed[0], random)
    return changed


def _array(frame: bytes, random: Random) -> bytes:
    """One number, or its length, is another one."""
    if random.random() < 0.3:
        return frame[: 4 * random.randint(0, len(frame) // 4)] + random.choice((b"", b"\0", b"\0\0\0\0"))
    at = 4 * random.randrange(max(1, len(frame) // 4))
    return frame[:at] + random.choice(NUMBERS) + frame[at + 4 :]


def _header(frame: bytes, random: Random) -> bytes:
    plain = msgpack.unpackb(frame[len(PREFIX) :], strict_map_key=False)
    for _ in range(random.randint(1, 2)):
        plain = changed_plain(plain, random)
    try:
        return bytes(PREFIX + msgpack.packb(plain))
    except (OverflowError, ValueError):  # beyond 64 bits or too deep to be packed
        return frame


def changed_text(text: str, random: Random) -> str:
    """One to three changes of lines, values or characters."""
    for _ in range(random.randint(1, 3)):
        text = random.choice(_OF_TEXT)(text, random)
    return text


def _lines(text: str, random: Random) -> str:
    lines = text.split("\n")
    at, there = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(there, lines[at])
        case 2:
            lines[at] = " " * random.randint(1, 3) + lines[at]
        case _:
            lines[at] = lines[at].lstrip()
    return "\n".join(lines)


def _value(text: str, random: Random) -> str:
    lines = text.split("\n")
    at = random.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {random.choice(WORDS)}"
    return "\n".join(lines)


def _inserted(text: str, random: Random) -> str:
    at = random.randint(0, len(text))
    return text[:at] + random.choice(WORDS) + text[at:]


def _cut(text: str, random: Random) -> str:
    at = random.randint(0, len(text))
    return text[:at] + text[at + random.randint(1, 20) :]


_OF_TEXT: tuple[Callable[[str, Random], str], ...] = (_lines, _value, _value, _value, _inserted, _cut)

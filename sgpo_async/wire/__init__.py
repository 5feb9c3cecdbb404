"""Records, defined once, and the codec that carries them between processes."""

from sgpo_async.wire.codec import decode, encode
from sgpo_async.wire.records import PROTOCOL

__all__ = ["PROTOCOL", "decode", "encode"]

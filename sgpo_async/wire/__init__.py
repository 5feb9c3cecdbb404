"""The messages that processes exchange by ZeroMQ, and the codec that encodes and decodes them."""

from sgpo_async.wire.codec import decode, encode
from sgpo_async.wire.records import PROTOCOL

__all__ = ["PROTOCOL", "decode", "encode"]

"""Changed messages at the codec."""

from __future__ import annotations

from random import Random

from sgpo_async.errors import WireError
from sgpo_async.fuzz.corpus import messages
from sgpo_async.fuzz.mutate import changed_frames
from sgpo_async.fuzz.outcome import Record, refusal
from sgpo_async.wire import decode, encode

MAX_BYTES = 2**22


def attacks(seed: int, inputs: int, record: Record) -> None:
    """Decode `inputs` changed messages. What is accepted must encode to something that is accepted, too."""
    corpus = [encode(message) for message in messages()]
    for number in range(inputs):
        random = Random(f"{seed} {number}")
        frames = changed_frames(random.choice(corpus), random)
        try:
            message = decode(frames, max_bytes=MAX_BYTES)
        except WireError as error:
            record(refusal(error))
            continue
        again = encode(message)
        assert encode(decode(again, max_bytes=MAX_BYTES)) == again
        record("accepted")

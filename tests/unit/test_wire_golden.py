"""Every record is encoded as in its golden file, which was written when PROTOCOL was last increased.

A golden file holds one hexadecimal line per frame. `python tests/unit/test_wire_golden.py` rewrites the files; it stops
if the encoding has changed but PROTOCOL has not.
"""

import dataclasses
import sys
from pathlib import Path
from typing import get_args

import msgpack
import numpy as np
import pytest

from sgpo_async.wire import PROTOCOL, decode, encode
from sgpo_async.wire.records import (
    Ack,
    BatchRequest,
    BenchmarkScore,
    Canary,
    CloseSender,
    Commit,
    Committed,
    Evaluate,
    Evaluated,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Lease,
    Message,
    NoBatch,
    OpenSender,
    PartialRollout,
    Pending,
    Progress,
    Published,
    Ready,
    Refused,
    Release,
    Restore,
    Restored,
    Revoked,
    Rollout,
    SenderDown,
    SenderUp,
    Settings,
    SettingsRequest,
    Shard,
    Snapshot,
    SnapshotRequest,
    Status,
    StatusRequest,
    Stop,
    Welcome,
)

FOLDER = Path(__file__).parents[1] / "golden" / "wire"

AUTONOMOUS = Rollout(
    task=17,
    attempt=1,
    slot=0,
    purpose="train",
    guided=False,
    prompt=np.array([1, 260, 3], np.int32),
    tokens=np.array([5, 70000, 2], np.int32),
    logprobs=np.array([-0.5, -1.25, -0.0625], np.float32),
    versions=np.array([3, 4], np.int32),
    digests=np.array([-(2**63), 4711], np.int64),
    ends=np.array([2, 3], np.int32),
    reward=0.0,
    finish="length",
)
GUIDED = dataclasses.replace(
    AUTONOMOUS,
    slot=8,
    guided=True,
    reward=1.0,
    finish="stop",
    unguided_logprob=-12.5,
    top_tokens=np.array([5, 6, 70000, 5, 2, 9], np.int32),
    top_logprobs=np.array([-0.5, -1, -1.25, -1.5, -0.0625, -3], np.float32),
    kept=np.array([6, 7, 5], np.int32),
    kept_sizes=np.array([2, 0, 1], np.int32),
)

PART = PartialRollout(
    slot=9,
    start=0,
    tokens=np.array([5, 70000], np.int32),
    logprobs=np.array([-0.5, -1.25], np.float32),
    versions=np.array([3, 4], np.int32),
    digests=np.array([1, -2], np.int64),
    ends=np.array([1, 2], np.int32),
    top_tokens=np.array([5, 6, 70000, 5], np.int32),
    top_logprobs=np.array([-0.5, -1, -1.25, -1.5], np.float32),
    kept=np.array([6], np.int32),
    kept_sizes=np.array([0, 1], np.int32),
)

EXAMPLES: list[Message] = [
    Hello(
        role="learner",
        name="learner-0",
        tokenizer="9f2c",
        bfloat16=True,
        rank=1,
        world_size=2,
        vocabulary=151936,
        holds=np.array([17, 1, 18, 0], np.int32),
        machine="b3d1 pid:[4026531836]",
        store="/proc/7/fd/9",
        serves=True,
        road="sockets",
        direct=True,
        token="0f3a",
    ),
    Welcome(
        session_host="127.0.0.1",
        session_port=40001,
        session_secret=b"secret",
        source="actor-2",
        run_id="5e0c",
        folder="s3://bucket/run",
        store="/dev/shm/store",
        version=41,
        begun=True,
    ),
    Refused(reason="name actor-1 is taken; choose another", final=True),
    Ready(tasks=4, version=3),
    Lease(
        task=17,
        attempt=1,
        purpose="train",
        problem="2 + 2 = ? (naïve)",
        answer="4",
        verifier="math",
        strategy=None,
        autonomous=8,
        guided=4,
        min_version=1,
        seed=2**62,
        temperature=0.75,
        top_p=0.95,
        max_new_tokens=16384,
        top_k=1024,
        top_logprobs_num=2,
        unguided_scores=True,
        finished=np.array([0, 3], np.int32),
        partial=(PART,),
    ),
    Revoked(task=17, attempt=1),
    Progress(
        task=17,
        attempt=1,
        purpose="train",
        partial=(dataclasses.replace(PART, start=7), dataclasses.replace(PART, slot=10, finish="stop")),
    ),
    OpenSender(sender=3, name="actor-2", road="sockets"),
    CloseSender(sender=3),
    SenderUp(sender=3, host="10.0.0.7", port=40001, secret=b"secret"),
    SenderDown(sender=3, reason="the weight receiver is gone"),
    dataclasses.replace(GUIDED, purpose="evaluate"),
    Ack(task=17, attempt=1, slot=8),
    Release(task=17, attempt=1, reason="drains"),
    Heartbeat(
        state="serving",
        version=3,
        digest=4711,
        running=12,
        tokens=123456,
        busy_s=9.5,
        weights_s=0.25,
        wall_s=10.25,
        tasks=np.array([17, 18], np.int32),
    ),
    Canary(engine="http://127.0.0.1:30000", version=3, digest=4711, logprobs=np.array([-1.5, -12], np.float32)),
    Goodbye(reason="drained"),
    Stop(reason="finished"),
    BatchRequest(step=3, stopping="learner rank 1 received SIGTERM"),
    Pending(idle_s=1.5),
    Shard(step=3, version=4, problems=16, rollouts=(AUTONOMOUS, GUIDED)),
    NoBatch(step=3, reason="learner rank 1 received SIGTERM"),
    Commit(step=3),
    Committed(step=3, status={"step": 3, "ledger": {"trained": 16}}),
    Published(version=4, digest=-5, canary=np.array([-1.5, -11], np.float32), store="/proc/7/fd/9", secret=b"secret"),
    Evaluate(version=4),
    Evaluated(
        version=4,
        pass_auto=0.125,
        pass_guided=0.9375,
        problems=200,
        served_oldest=4,
        served_newest=6,
        lag=1.25,
        benchmarks=(BenchmarkScore(name="aime24", avg=0.25, low=0.125, high=0.375, samples=32, problems=30),),
    ),
    SnapshotRequest(step=3),
    Snapshot(step=3, state=b"\x00\x01state"),
    Restore(state=b"\x00\x01state", id="a1"),
    Restored(version=7),
    Finish(reason="finished"),
    StatusRequest(),
    Status(status={"actors": [{"name": "actor-1", "lag": 0.5}]}),
    SettingsRequest(),
    Settings(settings={"name": "run", "hub": {"max_lag": 2, "keys": ""}, "x": [1, 2.5, None, True]}),
]


def text_of(message: Message) -> str:
    return "".join(bytes(frame).hex() + "\n" for frame in encode(message))


def frames_of(text: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in text.splitlines()]


def path_of(message: Message) -> Path:
    return FOLDER / f"{type(message).__name__}.hex"


def test_every_record_has_a_golden_file() -> None:
    assert [type(message) for message in EXAMPLES] == list(get_args(Message))
    assert {path.name for path in FOLDER.iterdir()} == {path_of(message).name for message in EXAMPLES}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_golden_file_decodes_to_its_message(message: Message) -> None:
    decoded = decode(frames_of(path_of(message).read_text()), max_bytes=2**20)
    assert type(decoded) is type(message)
    np.testing.assert_equal(dataclasses.asdict(decoded), dataclasses.asdict(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_encodes_to_its_golden_file(message: Message) -> None:
    assert text_of(message) == path_of(message).read_text(), (
        "the encoding has changed: raise PROTOCOL in sgpo_async/wire/records.py, "
        "then run python tests/unit/test_wire_golden.py"
    )


def rebuild() -> None:
    """Write the golden files; stop if a file holds other bytes with the same PROTOCOL."""
    for message in EXAMPLES:
        path = path_of(message)
        if path.exists() and path.read_text() != text_of(message):
            unpacker = msgpack.Unpacker()
            unpacker.feed(frames_of(path.read_text())[0])
            if unpacker.unpack() == PROTOCOL:
                sys.exit(f"{path} holds other bytes of protocol {PROTOCOL}: raise PROTOCOL first")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for message in EXAMPLES:
        path_of(message).write_text(text_of(message))


if __name__ == "__main__":
    rebuild()

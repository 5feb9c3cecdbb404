"""Differences between two versions of a bucket are lossless, bounded, and refused if damaged."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.errors import WeightsError
from sgpo_async.weights.delta import MOST_CHANGED, decode, encode

WORDS = 4096


@st.composite
def changes(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A bucket of random words, and the same with up to a quarter of them changed, at any distance from each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old = rng.integers(0, 2**16, draw(st.integers(1, WORDS)), dtype=np.uint16)
    count = draw(st.integers(0, int(len(old) * MOST_CHANGED)))
    at = rng.choice(len(old), count, replace=False)
    new = old.copy()
    kind = draw(st.sampled_from(("neighbour", "any", "extreme")))
    steps = {
        "neighbour": rng.choice([-1, 1], count),
        "any": rng.integers(1, 2**16, count),
        "extreme": np.full(count, 2**15),
    }
    new[at] += steps[kind].astype(np.int64).astype(np.uint16)
    return old.tobytes(), new.tobytes()


@given(pair=changes())
@settings(deadline=None)
def test_a_delta_gives_the_same_bytes(pair: tuple[bytes, bytes]) -> None:
    old, new = pair
    delta = encode(old, new)
    if delta is None:
        assert len(new) < 200, "only for a tiny bucket may the bytes themselves be smaller"
    else:
        assert len(delta) < len(new)
        assert decode(memoryview(old), memoryview(delta)) == new


def test_gaps_of_every_length() -> None:
    old = np.zeros(2**20, np.uint16)
    new = old.copy()
    for at in np.cumsum([1, 1, 254, 255, 256, 257, 65535, 65536, 65537, 300_000]) - 1:
        new[at] = 1
    new[[0, -1]] = 7, 65535
    delta = encode(old.tobytes(), new.tobytes())
    assert delta is not None and len(delta) < 200
    assert decode(old.tobytes(), delta) == new.tobytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (bytes(100), bytes(range(1, 101))),
        (bytes(3), bytes(2) + b"\1"),
        (b"", b""),
    ],
    ids=["most words changed", "half a word", "empty"],
)
def test_what_is_no_smaller_as_a_delta_is_sent_whole(old: bytes, new: bytes) -> None:
    assert encode(old, new) is None


def test_a_step_of_adamw_takes_few_bytes() -> None:
    """At a learning rate of 1e-6, weights of the usual size: under a tenth of their bytes."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.02 * torch.randn(512, 1024))
    optimiser = torch.optim.AdamW([weight], lr=1e-6)
    versions = []
    for _ in range(4):
        versions.append(weight.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        weight.grad = torch.randn_like(weight)
        optimiser.step()
    for old, new in pairwise(versions):
        delta = encode(old, new)
        assert delta is not None and 0 < len(delta) < len(new) / 10
        assert decode(old, delta) == new


@given(data=st.data())
@settings(deadline=None)
def test_a_damaged_delta_is_refused_or_gives_a_whole_bucket_of_other_bytes(data: st.DataObject) -> None:
    """It never raises another error, and never takes more memory than its bucket; the checksum finds the rest."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**16, 500, dtype=np.uint16)
    new = old.copy()
    new[::17] += 1
    delta = encode(old.tobytes(), new.tobytes())
    assert delta is not None
    plain = bytearray(zlib.decompress(delta))
    for _ in range(data.draw(st.integers(1, 4))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(plain)))
    for damaged in (zlib.compress(plain), zlib.compress(plain[:cut]), delta[: data.draw(st.integers(0, len(delta)))]):
        try:
            assert len(decode(old.tobytes(), damaged)) == 1000
        except WeightsError as error:
            assert str(error).startswith("weights: a delta ")


def test_a_delta_that_inflates_beyond_its_bucket_is_refused() -> None:
    with pytest.raises(WeightsError, match="is damaged"):
        decode(bytes(100), zlib.compress(bytes(10**7)))

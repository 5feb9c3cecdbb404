"""Encoding and decoding of the manifest, and the faults that its checksums detect."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.errors import WeightsError
from sgpo_async.weights import Bucket, Manifest, TensorEntry
from sgpo_async.weights.manifest import aligned

numbers = st.integers(0, 2**63 - 1)
entries = st.builds(
    TensorEntry,
    name=st.text(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    shape=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    offset=numbers,
    nbytes=numbers,
)
manifests = st.builds(
    Manifest,
    version=numbers,
    digest=st.text("0123456789abcdef", min_size=32, max_size=32),
    published_at=st.floats(allow_nan=False),
    nbytes=numbers,
    tensors=st.lists(entries, max_size=5).map(tuple),
    buckets=st.lists(st.builds(Bucket, numbers, numbers, st.integers(0, 2**64 - 1)), max_size=5).map(tuple),
)


@given(manifests)
def test_decoding_inverts_encoding(manifest: Manifest) -> None:
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@given(manifests, st.data())
def test_any_flipped_bit_is_detected(manifest: Manifest, data: st.DataObject) -> None:
    encoded = bytearray(manifest.to_bytes())
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WeightsError, match="checksum"):
        Manifest.from_bytes(bytes(encoded))


@given(manifests, st.data())
def test_a_truncated_manifest_is_detected(manifest: Manifest, data: st.DataObject) -> None:
    encoded = manifest.to_bytes()
    with pytest.raises(WeightsError, match="checksum"):
        Manifest.from_bytes(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


def test_a_failed_check_names_version_and_bucket() -> None:
    good = b"abcd"
    buckets = (Bucket(0, 4, xxhash.xxh3_64_intdigest(good)),)
    manifest = Manifest(7, "0" * 32, 0.0, 4, (), buckets)
    manifest.check(0, good)
    for bad in (b"abce", b"abc", b"abcde", b""):
        with pytest.raises(WeightsError, match="version 7: bucket 0"):
            manifest.check(0, bad)


@given(st.integers(0, 2**40), st.sampled_from([1, 64, 4096]))
def test_aligned_rounds_up_to_the_next_multiple(nbytes: int, alignment: int) -> None:
    result = aligned(nbytes, alignment)
    assert result % alignment == 0
    assert 0 <= result - nbytes < alignment

"""Pulling a weight version from a source that fails in different ways."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sgpo_async.errors import SessionError, Superseded, WeightsError
from sgpo_async.session.pull import ATTEMPTS, IN_FLIGHT, PendingBucket, Sent, pull
from sgpo_async.weights import Manifest, StoreFile, StoreReader, StoreWriter


class Source:
    """A store that serves buckets; `damage` gets the index and bytes of a bucket, and returns the bytes to send."""

    def __init__(self, path: str, damage: Callable[[int, bytearray], bytes | bytearray | None]) -> None:
        self.writer, self.reader = StoreWriter(path, bucket_bytes=64), StoreReader(path)
        self.damage = damage
        self.requested: list[int] = []
        self.bases: list[int | None] = []
        self.in_flight = self.max_in_flight = 0

    def publish(self, version: int) -> None:
        self.writer.publish(version, [("a", torch.full((100,), float(version))), ("b", torch.ones(40))])

    def request(self, version: int, index: int, base: int | None) -> PendingBucket:
        self.requested.append(index)
        self.bases.append(base)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

        def pending() -> Sent | None:
            self.in_flight -= 1
            found, is_delta = self.reader.bucket_or_delta(version, index, base)
            data = self.damage(index, found)
            return None if data is None else Sent(memoryview(data), is_delta)

        return pending


@pytest.fixture
def paths() -> Iterator[tuple[str, str]]:
    files = StoreFile("/nowhere"), StoreFile("/nowhere")
    yield files[0].path, files[1].path
    for file in files:
        file.close()


def undamaged(_: int, data: bytearray) -> bytearray:
    return data


def test_every_version_arrives_complete(paths: tuple[str, str]) -> None:
    source, local = Source(paths[0], undamaged), StoreReader(paths[1])
    writer = StoreWriter(paths[1])
    for version in (0, 1, 4):
        source.publish(version)
        manifest = source.reader.manifest()
        assert manifest is not None
        pull(manifest, source.request, writer)
        assert local.manifest() == manifest
        assert torch.equal(local.tensors(version)["a"], torch.full((100,), float(version)))
    assert source.max_in_flight == IN_FLIGHT


def test_a_damaged_bucket_is_requested_again(paths: tuple[str, str]) -> None:
    faults = iter([True, True])

    def damaged(index: int, data: bytearray) -> bytearray:
        if index == 2 and next(faults, False):
            data[5] ^= 1
        return data

    source = Source(paths[0], damaged)
    source.publish(0)
    manifest = source.reader.manifest()
    assert manifest is not None
    pull(manifest, source.request, StoreWriter(paths[1]))
    assert source.requested.count(2) == 3
    assert StoreReader(paths[1]).version() == 0


def test_a_version_whose_bucket_stays_damaged_is_never_visible(paths: tuple[str, str]) -> None:
    source, writer = Source(paths[0], undamaged), StoreWriter(paths[1])
    source.publish(0)
    source.publish(1)
    good = source.reader.manifest()
    assert good is not None
    pull(good, source.request, writer)
    source.damage = lambda index, data: bytes(len(data)) if index == 1 else data
    source.requested.clear()
    source.publish(2)
    manifest = source.reader.manifest()
    assert manifest is not None
    with pytest.raises(WeightsError, match="version 2: bucket 1"):
        pull(manifest, source.request, writer)
    assert source.requested.count(1) == ATTEMPTS
    assert StoreReader(paths[1]).manifest() == good
    source.damage = undamaged
    pull(manifest, source.request, writer)
    assert StoreReader(paths[1]).manifest() == manifest


def test_a_version_that_is_overwritten_at_the_source_raises_superseded(paths: tuple[str, str]) -> None:
    source = Source(paths[0], lambda index, data: None if index == 3 else data)
    source.publish(0)
    manifest = source.reader.manifest()
    assert manifest is not None
    with pytest.raises(Superseded, match="version 0"):
        pull(manifest, source.request, StoreWriter(paths[1]))
    assert StoreReader(paths[1]).version() is None


def test_an_error_of_the_session_ends_the_pull(paths: tuple[str, str]) -> None:
    def lost(_: int, _data: bytearray) -> bytearray:
        raise SessionError("gone")

    source = Source(paths[0], lost)
    source.publish(0)
    manifest = source.reader.manifest()
    assert manifest is not None
    with pytest.raises(SessionError):
        pull(manifest, source.request, StoreWriter(paths[1]))
    assert StoreReader(paths[1]).version() is None


class SmallSteps(Source):
    """A source whose versions differ in few words, in buckets of 8 KB."""

    def __init__(self, path: str) -> None:
        super().__init__(path, undamaged)
        self.writer = StoreWriter(path, bucket_bytes=8192)
        self.values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def publish(self, version: int) -> None:
        self.values = self.values.clone()
        self.values[version::500] += 1
        self.writer.publish(version, [("a", self.values), ("b", torch.full((10,), float(version)))])

    def newest(self) -> Manifest:
        manifest = self.reader.manifest()
        assert manifest is not None
        return manifest


def test_a_version_arrives_as_the_difference_to_the_one_before(paths: tuple[str, str]) -> None:
    source, writer, local = SmallSteps(paths[0]), StoreWriter(paths[1]), StoreReader(paths[1])
    received = []
    for version in range(4):
        source.publish(version)
        received.append(pull(source.newest(), source.request, writer, deltas=True))
        assert torch.equal(local.tensors(version)["a"], source.values)
        assert local.manifest() == source.newest()
    whole = source.newest().nbytes
    assert received[0] == whole, "a newcomer gets a whole version"
    assert all(0 < size < whole / 10 for size in received[1:])
    assert set(source.bases[:5]) == {None} and set(source.bases[5:10]) == {0}


def test_without_deltas_every_version_is_pulled_whole(paths: tuple[str, str]) -> None:
    source, writer = SmallSteps(paths[0]), StoreWriter(paths[1])
    for version in range(2):
        source.publish(version)
        assert pull(source.newest(), source.request, writer) == source.newest().nbytes
    assert set(source.bases) == {None}


def test_a_node_that_missed_a_version_pulls_the_next_one_whole(paths: tuple[str, str]) -> None:
    """The source holds two versions, so it no longer has the one that the difference would be to."""
    source, writer = SmallSteps(paths[0]), StoreWriter(paths[1])
    source.publish(0)
    pull(source.newest(), source.request, writer, deltas=True)
    for version in (1, 2):
        source.publish(version)
    assert pull(source.newest(), source.request, writer, deltas=True) == source.newest().nbytes
    assert torch.equal(StoreReader(paths[1]).tensors(2)["a"], source.values)


def test_most_words_changed_means_whole_buckets(paths: tuple[str, str]) -> None:
    source, writer = Source(paths[0], undamaged), StoreWriter(paths[1])
    for version, tensor in enumerate((torch.zeros(400), torch.randn(400))):
        source.writer.publish(version, [("a", tensor)])
        manifest = source.reader.manifest()
        assert manifest is not None
        assert pull(manifest, source.request, writer, deltas=True) == manifest.nbytes
    assert 0 in source.bases


@pytest.mark.parametrize("wrong", ["damaged", "of another base"])
def test_a_wrong_difference_is_replaced_by_the_whole_bucket(paths: tuple[str, str], wrong: str) -> None:
    source, writer = SmallSteps(paths[0]), StoreWriter(paths[1])
    source.publish(0)
    if wrong == "of another base":  # the same number, other weights: of another run
        writer.publish(0, [("a", torch.zeros(20_000, dtype=torch.bfloat16)), ("b", torch.zeros(10))])
    else:
        pull(source.newest(), source.request, writer)
        source.damage = lambda index, data: data[:-3] if index == 2 and source.bases[-1] is not None else data
    source.publish(1)
    source.bases.clear()
    pull(source.newest(), source.request, writer, deltas=True)
    assert torch.equal(StoreReader(paths[1]).tensors(1)["a"], source.values)
    assert None in source.bases and 0 in source.bases

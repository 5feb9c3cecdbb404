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

    def newest(self) -> Manifest:
        encoded = self.reader.encoded_manifest()
        assert encoded is not None
        return Manifest.from_bytes(encoded)

    def request(self, version: int, index: int, base: int | None) -> PendingBucket:
        self.requested.append(index)
        self.bases.append(base)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

        def pending() -> Sent | None:
            self.in_flight -= 1
            found = self.reader.bucket_or_delta(version, index, base)
            if found is None:
                return None
            data = self.damage(index, bytearray(found[0]))
            if data is None:
                raise Superseded(f"version {version}")
            return Sent(memoryview(data), found[1])

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


class Lost(Exception):
    """The source is gone."""


class Relay:
    """A node between a source and another node: it holds the first `available` buckets, and gets one per question."""

    def __init__(self, source: Source, path: str, available: int) -> None:
        self.manifest = source.newest()
        self.source, self.reader, self.requested = source, StoreReader(path), list[int]()
        self.incoming = StoreWriter(path).receive(self.manifest)
        for _ in range(available):
            self.advance()

    def advance(self) -> None:
        index = self.incoming.verified
        if index < len(self.manifest.buckets):
            self.incoming.put(index, self.source.reader.bucket(self.manifest.version, index))

    def request(self, version: int, index: int, base: int | None) -> PendingBucket:
        self.requested.append(index)

        def pending() -> Sent | None:
            found = self.reader.bucket_or_delta(version, index, base)
            self.advance()
            return None if found is None else Sent(memoryview(found[0]), found[1])

        return pending


@pytest.fixture
def third() -> Iterator[str]:
    file = StoreFile("/nowhere")
    yield file.path
    file.close()


@pytest.mark.parametrize("available", [0, 3, 9])
def test_a_node_passes_on_a_version_that_it_still_receives(paths: tuple[str, str], third: str, available: int) -> None:
    source = Source(paths[0], undamaged)
    source.publish(5)
    relay = Relay(source, paths[1], available)
    assert relay.reader.version() is None and relay.reader.offered() == 5
    local = StoreReader(third)
    assert pull(source.newest(), relay.request, StoreWriter(third)) == source.newest().nbytes
    assert local.manifest() == source.newest()
    assert torch.equal(local.tensors(5)["a"], torch.full((100,), 5.0))
    assert relay.requested.count(8) >= 1


def test_a_source_that_gets_no_bucket_ends_the_pull(paths: tuple[str, str], third: str) -> None:
    source = Source(paths[0], undamaged)
    source.publish(0)
    relay = Relay(source, paths[1], 2)
    relay.advance = lambda: None  # type: ignore[method-assign]
    with pytest.raises(SessionError, match="version 0: no new bucket within 0.05 s"):
        pull(source.newest(), relay.request, StoreWriter(third), silence_s=0.05)
    assert StoreReader(third).version() is None


@pytest.mark.parametrize("deltas", [False, True])
def test_a_lost_source_costs_only_the_buckets_that_were_not_here(paths: tuple[str, str], deltas: bool) -> None:
    """Another writer, as after the death of a process, continues after the last verified bucket from another source."""
    source, requested = SmallSteps(paths[0]), list[int]()
    source.publish(0)
    pull(source.newest(), source.request, StoreWriter(paths[1]))
    source.publish(1)
    source.requested.clear()

    def lost(index: int, data: bytearray) -> bytearray:
        requested.append(index)
        if index == 3:
            raise Lost
        return data

    source.damage = lost
    with pytest.raises(Lost):
        pull(source.newest(), source.request, StoreWriter(paths[1]), deltas=deltas)
    assert StoreReader(paths[1]).version() == 0
    source.damage = undamaged
    source.requested.clear()
    received = pull(source.newest(), source.request, StoreWriter(paths[1]), deltas=deltas)
    assert source.requested == [3, 4], "buckets 0 to 2 were here already"
    assert received < source.newest().nbytes
    assert torch.equal(StoreReader(paths[1]).tensors(1)["a"], source.values)


def test_a_newer_version_replaces_one_that_was_interrupted(paths: tuple[str, str]) -> None:
    source, local = Source(paths[0], undamaged), StoreReader(paths[1])
    for version in (0, 1, 2):
        source.publish(version)
        incoming = StoreWriter(paths[1]).receive(source.newest())
        incoming.put(0, source.reader.bucket(version, 0))
        assert local.offered() == version and local.version() is None
        source.requested.clear()
    with pytest.raises(Superseded):
        local.bucket_or_delta(1, 0, None)
    pull(source.newest(), source.request, StoreWriter(paths[1]))
    assert source.requested[0] == 1
    assert local.manifest() == source.newest()
    assert torch.equal(local.tensors(2)["a"], torch.full((100,), 2.0))


def test_the_same_version_with_other_content_is_not_continued(paths: tuple[str, str], third: str) -> None:
    source, other = Source(paths[0], undamaged), Source(third, undamaged)
    source.publish(0)
    other.writer.publish(0, [("a", torch.zeros(100)), ("b", torch.ones(40))])
    StoreWriter(paths[1]).receive(source.newest()).put(0, source.reader.bucket(0, 0))
    pull(other.newest(), other.request, StoreWriter(paths[1]))
    assert other.requested[0] == 0
    assert torch.equal(StoreReader(paths[1]).tensors(0)["a"], torch.zeros(100))

"""Pulling a weight version from a source that fails in different ways."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sgpo_async.errors import SessionError, Superseded, WeightsError
from sgpo_async.session.pull import ATTEMPTS, IN_FLIGHT, PendingBucket, pull
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter


class Source:
    """A store that serves buckets; `damage` gets the index and bytes of a bucket, and returns the bytes to send."""

    def __init__(self, path: str, damage: Callable[[int, bytearray], bytes | bytearray | None]) -> None:
        self.writer, self.reader = StoreWriter(path, bucket_bytes=64), StoreReader(path)
        self.damage = damage
        self.requested: list[int] = []
        self.in_flight = self.max_in_flight = 0

    def publish(self, version: int) -> None:
        self.writer.publish(version, [("a", torch.full((100,), float(version))), ("b", torch.ones(40))])

    def request(self, version: int, index: int) -> PendingBucket:
        self.requested.append(index)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

        def pending() -> memoryview | None:
            self.in_flight -= 1
            data = self.damage(index, self.reader.bucket(version, index))
            return None if data is None else memoryview(data)

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

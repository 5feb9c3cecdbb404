"""Weights by way of a folder: whole versions, differences, what is removed, and errors of the filesystem."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_support import s3_service

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights import Manifest, StoreFile, StoreReader, StoreWriter
from sgpo_async.weights.delta import decode
from sgpo_async.weights.folder import WeightFolder

VALUES = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).bfloat16()


class Store:
    """A store whose versions differ in few words, in five buckets of 8 KB."""

    def __init__(self) -> None:
        self.file = StoreFile("/nowhere")
        self.writer = StoreWriter(self.file.path, bucket_bytes=8192)
        self.reader = StoreReader(self.file.path)

    def publish(self, version: int) -> Manifest:
        values = VALUES.clone()
        values[version::500] += 1
        return self.writer.publish(version, [("w", values)])


def upload(folder: WeightFolder, store: Store, version: int) -> None:
    assert sum(folder.upload(store.reader, version)) == 40_000


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.file.close()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "s3":
        with s3_service(monkeypatch) as bucket:
            yield f"{bucket}/run"
    else:
        yield {"file": f"file://{tmp_path}/run", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


def test_the_newest_version_is_read_whole_or_as_a_difference(store: Store, url: str) -> None:
    folder, reading = WeightFolder(url), WeightFolder(url)
    assert reading.newest() is None
    manifests = {}
    for version in (0, 1, 4):
        manifests[version] = store.publish(version)
        upload(folder, store, version)
        assert reading.newest() == version
        assert Manifest.from_bytes(reading.manifest(version)) == manifests[version]
    for index in range(5):
        before, base_is_delta = reading.bucket(1, index, None)
        whole, is_delta = reading.bucket(4, index, None)
        assert not base_is_delta and not is_delta
        manifests[4].check(index, whole)
        delta, is_delta = reading.bucket(4, index, 1)
        assert is_delta and len(delta) < len(whole) / 10
        assert decode(before, delta) == whole
        assert reading.bucket(4, index, 3) == (whole, False), "no difference to another version"


def test_only_the_two_newest_versions_are_kept(store: Store, url: str) -> None:
    folder = WeightFolder(url)
    for version in range(4):
        store.publish(version)
        upload(folder, store, version)
    for version in (0, 1):
        with pytest.raises(Superseded, match=f"version {version}"):
            folder.bucket(version, 0, None)
        with pytest.raises(Superseded):
            folder.manifest(version)
    folder.manifest(2)


def test_nothing_but_old_versions_is_removed(store: Store, tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("validation", "v1", "v000000000.txt")]
    for other in others:
        other.mkdir()
    folder = WeightFolder(f"file://{tmp_path}")
    for version in range(3):
        store.publish(version)
        upload(folder, store, version)
    left = ["newest", "v000000001", "v000000002", *(other.name for other in others)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_a_version_that_the_store_gives_up_is_not_shown(store: Store, url: str) -> None:
    folder = WeightFolder(url)
    for version in range(3):
        store.publish(version)
    with pytest.raises(Superseded):
        upload(folder, store, 0)
    assert folder.newest() is None


@pytest.mark.parametrize("wrong", ["file:///proc/nowhere/run", "nonsense://bucket/run"])
def test_a_folder_that_cannot_be_used_is_an_error_with_a_remedy(store: Store, wrong: str) -> None:
    store.publish(0)
    with pytest.raises(WeightsError, match="hub.weight_folder: cannot .*check the URL"):
        upload(WeightFolder(wrong), store, 0)

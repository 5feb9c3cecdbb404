"""The double-buffered store: at every point of a publication, readers see only complete versions."""

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights import LazyTensors, StoreFile, StoreReader, StoreWriter, digest, store_layout

Weights = list[tuple[str, torch.Tensor]]


def weights(seed: int) -> Weights:
    """A small model of several dtypes, with an empty tensor and a scalar."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ("embed", torch.randn(50, 7, generator=generator)),
        ("norm", torch.randn(7, generator=generator).bfloat16()),
        ("none", torch.empty(0, 3)),
        ("step", torch.tensor(seed)),
        ("head", torch.randn(7, 50, generator=generator).t()),
    ]


def same(found: dict[str, torch.Tensor], expected: Weights) -> bool:
    return list(found) == [n for n, _ in expected] and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected
    )


@pytest.fixture
def path() -> Iterator[str]:
    file = StoreFile("/nowhere")
    yield file.path
    file.close()


def test_the_store_is_empty_before_the_first_publication(path: str, tmp_path: Path) -> None:
    for reader in (StoreReader(path), StoreReader(tmp_path / "absent")):
        assert reader.version() is None
        assert reader.manifest() is None
        assert reader.encoded_manifest() is None
        with pytest.raises(Superseded):
            reader.bucket(0, 0)


def test_a_reader_opened_before_the_first_publication_sees_every_version(path: str) -> None:
    reader = StoreReader(path)
    assert reader.manifest() is None
    writer = StoreWriter(path, bucket_bytes=100)
    for version in (0, 1, 2, 5, 9):
        published = writer.publish(version, iter(weights(version)))
        assert reader.version() == version
        assert reader.manifest() == published
        found = reader.tensors(version)
        assert same(found, weights(version))
        assert digest(found.items()) == published.digest == digest(weights(version))


def test_buckets_cover_the_data_and_match_their_checksums(path: str) -> None:
    manifest = StoreWriter(path, bucket_bytes=100).publish(3, weights(3))
    reader = StoreReader(path)
    assert len(manifest.buckets) > 10
    data = b""
    for index, bucket in enumerate(manifest.buckets):
        piece = reader.bucket(3, index)
        manifest.check(index, piece)
        assert bucket.offset == len(data)
        assert bucket.nbytes == 100 or index == len(manifest.buckets) - 1
        data += piece
    assert len(data) == manifest.nbytes
    embed = manifest.tensors[0]
    assert data[embed.offset : embed.offset + embed.nbytes] == weights(3)[0][1].numpy().tobytes()


def test_a_version_is_readable_until_the_second_next_publication_starts(path: str) -> None:
    writer, reader = StoreWriter(path), StoreReader(path)
    writer.publish(1, weights(1))
    writer.publish(2, weights(2))
    assert same(reader.tensors(1), weights(1))

    def checked_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for item in weights(3):
            with pytest.raises(Superseded, match="version 1"):
                reader.tensors(1)
            assert reader.version() == 2
            assert same(reader.tensors(2), weights(2))
            yield item

    writer.publish(3, checked_tensors())
    assert reader.version() == 3
    assert same(reader.tensors(2), weights(2))


def test_a_version_overwritten_during_the_copy_raises_superseded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = StoreWriter(path), StoreReader(path)
    writer.publish(1, weights(1))
    assert reader.manifest() is not None
    original = store_layout.read_into

    def overwrite_then_read(fd: int, view: memoryview, offset: int) -> int:
        monkeypatch.undo()
        writer.publish(2, weights(2))
        writer.publish(3, weights(3))
        return original(fd, view, offset)

    monkeypatch.setattr(store_layout, "read_into", overwrite_then_read)
    with pytest.raises(Superseded, match="version 1"):
        reader.tensors(1)


def other_models() -> list[Weights]:
    known = weights(2)
    return [
        known[:-1],
        [*known, ("more", torch.ones(1))],
        [*known[1:], known[0]],
        [("other", known[0][1]), *known[1:]],
        [("embed", known[0][1].reshape(7, 50)), *known[1:]],
        [("embed", known[0][1].double()), *known[1:]],
    ]


@pytest.mark.parametrize("other", other_models())
def test_different_tensors_are_rejected_and_the_newest_version_is_unchanged(path: str, other: Weights) -> None:
    writer, reader = StoreWriter(path), StoreReader(path)
    writer.publish(1, weights(1))
    wrong_tensor, wrong_count = r"tensor \d must be .*, got .*", "the number of tensors must be 5, got 4"
    remedy = "publish the same parameters in the same order"
    with pytest.raises(WeightsError, match=rf"^weights version 2: ({wrong_tensor}|{wrong_count}); {remedy}$"):
        writer.publish(2, other)
    assert same(reader.tensors(1), weights(1))
    writer.publish(2, weights(2))
    assert same(reader.tensors(2), weights(2))


def test_duplicate_tensor_names_are_rejected(path: str) -> None:
    with pytest.raises(WeightsError, match="^weights version 0: tensor names must be unique, got 'a' twice$"):
        StoreWriter(path).publish(0, [("a", torch.ones(1)), ("a", torch.ones(1))])
    assert StoreReader(path).version() is None


@pytest.mark.parametrize("version", [3, 4])
def test_a_version_that_is_not_newer_is_rejected(path: str, version: int) -> None:
    StoreWriter(path).publish(4, weights(4))
    writer = StoreWriter(path)
    expected = f"weights version must be > 4, the newest version in the store, got {version}"
    with pytest.raises(WeightsError, match=f"^{expected}$"):
        writer.publish(version, weights(version))


def test_an_error_during_publication_leaves_the_newest_version_unchanged(path: str) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield weights(2)[0]
        raise RuntimeError("gather failed")

    writer, reader = StoreWriter(path), StoreReader(path)
    with pytest.raises(RuntimeError):
        writer.publish(0, broken())
    assert reader.version() is None
    writer.publish(1, weights(1))
    with pytest.raises(RuntimeError):
        writer.publish(2, broken())
    assert reader.version() == 1
    writer.publish(2, weights(2))
    assert same(reader.tensors(2), weights(2))


def test_a_second_writer_continues_the_store_of_the_first(path: str) -> None:
    reader = StoreReader(path)
    for version in range(5):
        writer = StoreWriter(path)
        writer.publish(version, weights(version))
        writer.close()
        assert same(reader.tensors(version), weights(version))
        if version:
            assert same(reader.tensors(version - 1), weights(version - 1))
    expected = r"'embed' float32 \[50, 7\], got 'other' float32 \[3\]; publish the same parameters in the same order"
    with pytest.raises(WeightsError, match=f"^weights version 9: tensor 0 must be {expected}$"):
        StoreWriter(path).publish(9, [("other", torch.ones(3))])


def test_the_error_for_a_full_disk_names_a_remedy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WeightsError, match=r"No space left.*free some"):
        StoreWriter(path).publish(0, weights(0))
    assert StoreReader(path).version() is None


def test_buckets_are_read_in_place_and_cannot_be_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private mapping would count as memory in use: twice the size of a model in every process that sends it."""
    StoreWriter(path).publish(0, weights(0))
    found = StoreReader(path).bucket_or_delta(0, 0, None)
    assert found is not None and found[0].readonly and found[0] == StoreReader(path).bucket(0, 0)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(
        WeightsError, match="weight store: cannot map the file: Cannot allocate memory; free some memory"
    ):
        StoreReader(path).bucket_or_delta(0, 0, None)


def test_a_bucket_is_sent_without_a_warning_of_torch(path: str) -> None:
    StoreWriter(path).publish(0, weights(0))
    script = (
        "import sys; from sgpo_async.session import calls; from sgpo_async.weights import StoreReader; "
        "calls.callee.store = StoreReader(sys.argv[1]); print(calls.bucket(0, 0, None)[0].numel())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=240, check=True
    )
    assert int(ended.stdout) > 0 and not ended.stderr


def test_the_error_for_a_store_that_cannot_be_opened_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere/store: No such file"):
        StoreWriter(tmp_path / "nowhere" / "store")


shapes = st.lists(st.integers(0, 5), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6), st.integers(1, 300))
def test_any_model_is_read_back_unchanged(plan: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    file = StoreFile("/nowhere")
    try:
        writer, reader = StoreWriter(file.path, bucket_bytes=bucket_bytes), StoreReader(file.path)
        for version in range(3):
            model = [(f"t{i}", (torch.rand(s) * 100).to(dtype)) for i, (s, dtype) in enumerate(plan)]
            manifest = writer.publish(version, model)
            assert same(reader.tensors(version), model)
            assert manifest.digest == digest(model)
            for index in range(len(manifest.buckets)):
                manifest.check(index, reader.bucket(version, index))
    finally:
        file.close()


def test_lazy_tensors_are_readable_until_their_version_is_overwritten(path: str) -> None:
    writer, reader = StoreWriter(path), StoreReader(path)
    writer.publish(0, weights(0))
    lazy = LazyTensors(reader, 0)
    assert same(dict(lazy), weights(0))
    assert len(lazy) == 5
    for version in (1, 2):
        writer.publish(version, weights(version))
    with pytest.raises(Superseded):
        lazy["embed"]
    with pytest.raises(Superseded):
        LazyTensors(reader, 0)

"""A weight folder that hangs, and one that an earlier uploader has left: what reads and writes it goes on or ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgpo_async.errors import SessionError
from sgpo_async.session import calls
from sgpo_async.session.folder_world import LOOK_S, FolderWorld
from sgpo_async.session.settings import Deadlines, Settings
from sgpo_async.session.uploader import _upload, _whole_version
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter
from sgpo_async.weights.folder import WeightFolder

PATIENCE_S = 300.0


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every read of a file of a weight folder hangs."""
    release = threading.Event()

    def hang(*_: object) -> None:
        release.wait()

    monkeypatch.setattr(WeightFolder, "newest", hang)
    monkeypatch.setattr(WeightFolder, "_read", hang)
    yield
    release.set()


def test_a_folder_that_hangs_ends_the_receiver(hangs: None, tmp_path: Path) -> None:
    world = FolderWorld(f"file://{tmp_path}", Deadlines(silence_s=0.1))
    deadline = time.monotonic() + LOOK_S + PATIENCE_S
    with pytest.raises(SessionError, match="did not answer within 0.1 s"):
        while time.monotonic() < deadline:
            world.check()


def test_a_bucket_that_is_never_read_ends_the_receiver(hangs: None, tmp_path: Path) -> None:
    world = FolderWorld(f"file://{tmp_path}", Deadlines(file_s=0.1))
    with pytest.raises(SessionError, match="a file was not read within 0.1 s"):
        world.call(calls.bucket, 0, 0, None)


def test_the_uploader_goes_on_after_the_newest_version_unless_its_content_is_another(tmp_path: Path) -> None:
    folder, files = WeightFolder(f"file://{tmp_path}"), [StoreFile("/nowhere") for _ in range(2)]
    first, second = (StoreReader(file.path) for file in files)
    assert _whole_version(folder, first) == -1
    StoreWriter(files[0].path).publish(3, [("w", torch.ones(4))])
    list(folder.upload(first, 3))
    assert _whole_version(folder, first) == 3
    StoreWriter(files[1].path).publish(3, [("w", torch.zeros(4))])
    assert _whole_version(folder, second) == -1
    StoreWriter(files[0].path).publish(4, [("w", torch.zeros(4))])
    assert _whole_version(folder, first) == 3
    for file in files:
        file.close()


class Phases:
    """In place of `ChildSide`, which belongs to a process: the deadlines that it was told."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def phase(self, _: str, seconds: float) -> contextlib.AbstractContextManager[None]:
        self.seconds.append(seconds)
        return contextlib.nullcontext()


def test_every_bucket_is_uploaded_with_a_deadline_of_its_own(tmp_path: Path) -> None:
    folder, file, phases = WeightFolder(f"file://{tmp_path}"), StoreFile("/nowhere"), Phases()
    writer, store = StoreWriter(file.path, bucket_bytes=64), StoreReader(file.path)
    settings = Settings(name="the hub", parent=0, store=file.path, deadlines=Deadlines(file_s=7.0))
    for version in range(3):
        writer.publish(version, [("w", torch.full((48,), float(version)))])
    assert _upload(folder, store, 2, settings, phases)  # type: ignore[arg-type]
    assert folder.newest() == 2
    assert phases.seconds == [7.0] * 4, "three buckets, then manifest and name"
    assert not _upload(folder, store, 0, settings, phases), "the store has given it up"  # type: ignore[arg-type]
    assert folder.newest() == 2
    file.close()

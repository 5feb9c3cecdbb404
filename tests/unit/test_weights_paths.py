"""Anonymous store files."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from sgpo_async.errors import WeightsError
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, store_file


@pytest.mark.parametrize("expected_bytes", [0, 2**60])
def test_the_file_has_no_name_and_disappears_when_its_owner_closes_it(tmp_path: Path, expected_bytes: int) -> None:
    file = StoreFile(tmp_path, expected_bytes=expected_bytes)
    assert file.in_memory == (expected_bytes == 0)
    with Path(file.path).open("r+b") as reader:
        reader.write(b"weights")
        assert list(tmp_path.iterdir()) == []
        file.close()
        file.close()
        assert not Path(file.path).exists()
        reader.seek(0)
        assert reader.read() == b"weights"


def test_a_store_is_in_memory_only_if_its_two_buffers_fit_into_half_of_the_memory(tmp_path: Path) -> None:
    quarter = psutil.virtual_memory().total // 4
    file = StoreFile(tmp_path, expected_bytes=quarter)
    assert not file.in_memory
    file.close()


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000000", 400_000), ("500000", 0), ("max", 10**9), (f"{10**12}", 10**9)]
)
def test_the_available_memory_of_a_container_respects_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr(store_file.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert store_file.available_memory(tmp_path) == 10**9
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 100000\n")
    assert store_file.available_memory(tmp_path) == expected


def test_the_error_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere: No such file"):
        StoreFile(tmp_path / "nowhere", expected_bytes=2**60)


def test_an_earlier_store_whose_process_id_has_been_used_again_is_not_opened(tmp_path: Path) -> None:
    reader, writer = os.pipe()  # what another process has at this descriptor
    file = StoreFile(tmp_path, earlier=f"/proc/{os.getpid()}/fd/{writer}")
    assert Path(file.path).stat().st_size == 0
    file.close()
    os.close(reader)
    os.close(writer)


def test_a_store_file_follows_the_store_of_a_writer(tmp_path: Path) -> None:
    """A hub that is started again before the first publication does not know where the learner has its store."""
    earlier, now = StoreFile(tmp_path), StoreFile(tmp_path)
    writer = StoreWriter(earlier.path)
    writer.publish(0, [("weight", torch.ones(2))])
    path = now.path
    assert now.follow(writer.place)
    assert not now.follow(writer.place), "the same file"
    assert not now.follow("/proc/0/fd/0"), "a process that is gone"
    assert now.path == path
    reader = StoreReader(path)
    assert reader.tensors(0)["weight"].tolist() == [1.0, 1.0]
    reader.close()
    writer.close()
    for file in (earlier, now):
        file.close()

"""Store files without a name."""

from pathlib import Path

import psutil
import pytest

from sgpo_async.errors import WeightsError
from sgpo_async.weights import StoreFile


@pytest.mark.parametrize("expected_bytes", [0, 2**60])
def test_the_file_has_no_name_and_goes_with_its_holder(tmp_path: Path, expected_bytes: int) -> None:
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


def test_two_buffers_take_at_most_half_of_the_memory(tmp_path: Path) -> None:
    quarter = psutil.virtual_memory().total // 4
    file = StoreFile(tmp_path, expected_bytes=quarter)
    assert not file.in_memory
    file.close()


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere: No such file"):
        StoreFile(tmp_path / "nowhere", expected_bytes=2**60)

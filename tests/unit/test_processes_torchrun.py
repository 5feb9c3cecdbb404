"""What torchrun leaves in the temporary folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_async.processes.torchrun import forget_logs, torchrun


def rank_folder(root: Path, attempt: int, rank: int) -> Path:
    folder = root / "torchelastic_x" / "run_y" / f"attempt_{attempt}" / str(rank)
    folder.mkdir(parents=True)
    return folder


def ended_well(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(rank / "error.json"))
    forget_logs()


def test_the_last_rank_that_ends_well_removes_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ranks that still run stay: they may have to write an error into them."""
    killed = rank_folder(tmp_path, 0, 0)
    first, second = rank_folder(tmp_path, 1, 0), rank_folder(tmp_path, 1, 1)
    ended_well(first, monkeypatch)
    assert second.is_dir() and not first.exists() and not killed.exists()
    ended_well(second, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_what_holds_a_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, well = rank_folder(tmp_path, 0, 0), rank_folder(tmp_path, 1, 0)
    (failed / "error.json").write_text("{}")
    ended_well(well, monkeypatch)
    assert (failed / "error.json").exists() and not well.exists()


@pytest.mark.parametrize("value", ["", "error.json", "/a/b/error.json"])
def test_other_folders_are_left_alone(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, with a torchrun that writes no error files, and with --log-dir."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", value)
    forget_logs()
    given = tmp_path / "mine" / "run" / "attempt_0" / "0"
    given.mkdir(parents=True)
    ended_well(given, monkeypatch)
    assert given.is_dir()


@pytest.mark.parametrize("code", [0, 1])
def test_our_own_torchrun_leaves_nothing_behind(code: int, tmp_path: Path) -> None:
    command = [*torchrun(1), "--no-python", sys.executable, "-c", f"raise SystemExit({code})"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=False)
    assert ended.returncode == code, ended.stderr
    assert list(tmp_path.iterdir()) == []

"""The transport by disk: where versions are, what is left of them, errors of one line, modes as the umask says."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgpo_async.engines.sglang.weight_sync import folder as folder_module
from sgpo_async.engines.sglang.weight_sync.folder import PREFIX, ROOM, OwnedFolder, default_root
from sgpo_async.engines.sglang.weight_sync.model_facts import model_facts
from sgpo_async.engines.sglang.weight_sync.transports import DiskTransport, Prepared
from sgpo_async.errors import EngineError
from sgpo_async.model.folder import model_folder
from sgpo_async.weights import digest

LIMITED = """
import resource, sys
from tests.unit.test_sglang_disk import transport_of, TENSORS
from sgpo_async.errors import EngineError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
transport_of("")  # finds no temporary folder that can be written
transport = transport_of(sys.argv[2])
try:
    transport.write(7, TENSORS)
except EngineError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(transport.write(7, TENSORS))
"""
TENSORS = {"a": torch.zeros(1000), "b": torch.ones(1000)}


def transport_of(folder: str) -> DiskTransport:
    facts = model_facts(model_folder("builtin:cues"), dtype="float32", tp=1, device="cpu", digest=digest)
    return DiskTransport(facts, folder)


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_is_an_error_of_one_line_and_a_later_try_succeeds(tmp_path: Path, limit: int) -> None:
    """A limit of the size of files stands for the disk; the operating system reports both to the writing library."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), str(tmp_path)], capture_output=True, text=True, timeout=240,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, written = done.stdout.splitlines()
    (folder,) = tmp_path.iterdir()
    assert error.startswith(f"engine.sglang.folder: cannot write {folder}/v000007-")
    assert error.endswith("; free some space, or set another folder")
    assert [str(path) for path in folder.iterdir()] == [written]


def test_a_folder_that_cannot_be_made_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"engine\.sglang\.folder: cannot write .* \(Not a directory\); free some"):
        transport_of(str(tmp_path / "file" / "folder")).write(1, TENSORS)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_servers_of_another_user_can_read_a_version_if_the_umask_allows_it(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        folder = Path(transport_of(str(tmp_path)).write(1, TENSORS))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode}
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}


def test_a_version_is_kept_until_it_is_released_and_nothing_is_left_in_the_end(tmp_path: Path) -> None:
    transport = transport_of(str(tmp_path))
    written = [transport.write(version, TENSORS) for version in (1, 2, 1)]  # a new session begins with 1 again
    (home,) = tmp_path.iterdir()
    assert {str(path) for path in home.iterdir()} == set(written) and len(set(written)) == 3
    transport.release(Prepared(2, "00" * 16, [], written[1]))
    assert {str(path) for path in home.iterdir()} == {written[0], written[2]}
    transport.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from tests.unit.test_sglang_disk import transport_of, TENSORS
print(transport_of(sys.argv[1]).write(7, TENSORS), flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_actor_is_removed_by_the_next_one_and_that_of_a_running_one_is_not(
    tmp_path: Path,
) -> None:
    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    actors = [start(), start()]
    try:
        assert all(written.is_dir() for _, written in actors)  # the second one left the folder of the first alone
        (dead, left), (_, used) = actors
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert left.is_dir()
        own = Path(transport_of(str(tmp_path)).write(1, TENSORS))
        assert {path.name for path in tmp_path.iterdir()} == {used.parent.name, own.parent.name}
    finally:
        for process, _ in actors:
            process.kill()
            process.communicate()


def test_foreign_files_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("of the user")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    OwnedFolder(tmp_path, private=True).remove()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "elsewhere", f"{PREFIX}link"}


@pytest.mark.parametrize(
    ("writable", "room", "memory", "reason"),
    [
        (True, ROOM, 2 * ROOM, ""),
        (False, ROOM, 2 * ROOM, "is not writable"),
        (True, ROOM - 1, 2 * ROOM, "has 200 MB, and 3 versions need 300"),
        (True, ROOM, 2 * ROOM - 1, "3 versions need 300 MB, more than half of the available memory of 500"),
    ],
)
def test_versions_are_in_shared_memory_if_there_is_room(
    writable: bool, room: int, memory: int, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Containers often have 64 MB of shared memory. `room` and `memory` are multiples of a version."""
    nbytes = 100 * 2**20
    monkeypatch.setattr(folder_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path and writable)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room * nbytes))
    monkeypatch.setattr(folder_module, "available_memory", lambda: memory * nbytes)
    monkeypatch.setattr(folder_module.tempfile, "gettempdir", lambda: "/temporary")
    root, found = default_root(nbytes)
    assert (
        root == (Path("/temporary") if reason else tmp_path) and found.endswith(reason) and bool(found) == bool(reason)
    )


def test_the_log_says_once_that_shared_memory_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder_module, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(folder_module.tempfile, "gettempdir", lambda: str(tmp_path))
    transport = transport_of("")
    with caplog.at_level(logging.INFO):
        written = [transport.write(version, TENSORS) for version in (1, 2)]
    assert stat.S_IMODE(Path(written[0]).parent.stat().st_mode) == 0o700
    assert [record.getMessage() for record in caplog.records] == [
        f"weights for the SGLang servers are written to {tmp_path}: {tmp_path / 'none'} is not writable"
    ]
    transport.close()
    assert list(tmp_path.iterdir()) == []

"""The transport by disk: a full disk is an error of one line and leaves nothing behind; modes are as the umask says."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgpo_async.engines.sglang.weight_sync.model_facts import model_facts
from sgpo_async.engines.sglang.weight_sync.transports import DiskTransport
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
    assert error.startswith(f"engine.sglang.folder: cannot write {tmp_path}/v000007-")
    assert error.endswith("; free some space, or set another folder")
    assert [str(path) for path in tmp_path.iterdir()] == [written]


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

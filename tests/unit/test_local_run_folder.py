"""Who may write to a run's folder: the evidence that its hub lives, also on another machine that shares the disk."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sgpo_async.errors import HubError
from sgpo_async.hub.journal import Journal, in_use
from sgpo_async.local.run_folder import claim
from sgpo_async.weights import store_file
from sgpo_async.weights.store_file import machine

HOLD = (
    "import sys; from pathlib import Path; from sgpo_async.hub.journal import Journal; j = Journal(Path(sys.argv[1]))"
)


def write_hub_file(folder: Path, **changes: object) -> Path:
    contact = {"address": "tcp://10.0.0.1:5757", "pid": os.getpid(), "machine": machine()} | changes
    (folder / "hub.json").write_text(json.dumps(contact))
    return folder / "hub.json"


@contextmanager
def living_hub(folder: Path) -> Iterator[None]:
    """A process that has the journal open, as a hub has."""
    command = [sys.executable, "-c", f"{HOLD}; print(flush=True); sys.stdin.read()", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield
        process.kill()


def test_a_hub_of_this_machine_lives_as_long_as_its_process(tmp_path: Path) -> None:
    write_hub_file(tmp_path)
    with pytest.raises(HubError, match=rf"its hub is process {os.getpid()}"):
        claim(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    file = write_hub_file(tmp_path, pid=dead.pid)
    claim(tmp_path)
    assert not file.exists()


@pytest.mark.parametrize("elsewhere", [{"machine": "another boot pid:[4026532201]"}, {"machine": ""}])
def test_a_process_id_of_another_machine_says_nothing(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """Here it is that of this living process; the hub that it named is dead."""
    Journal(tmp_path).close()
    file = write_hub_file(tmp_path, **elsewhere)
    claim(tmp_path, continues=True)
    assert not file.exists() and (tmp_path / "hub.journal").exists()
    write_hub_file(tmp_path, **elsewhere)
    claim(tmp_path)
    assert not (tmp_path / "hub.journal").exists()


def test_a_living_hub_of_another_machine_is_known_by_its_lock_on_the_journal(tmp_path: Path) -> None:
    file = write_hub_file(tmp_path, machine="another", pid=2**22 + 1)
    with living_hub(tmp_path):
        assert in_use(tmp_path)
        message = (
            r"its hub is at tcp://10.0.0.1:5757, on another machine or in another container\); choose another name"
        )
        with pytest.raises(HubError, match=message):
            claim(tmp_path)
        assert file.exists()
    assert not in_use(tmp_path)
    claim(tmp_path)


def test_a_folder_without_a_journal_or_with_a_damaged_one_is_not_in_use(tmp_path: Path) -> None:
    assert not in_use(tmp_path) and not (tmp_path / "hub.journal").exists()
    (tmp_path / "hub.journal").write_bytes(b"no database" * 100)
    assert not in_use(tmp_path)


def test_a_sandbox_that_hides_what_identifies_it_is_a_machine_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = store_file.machine.__wrapped__
    assert identity() == identity() == machine()
    monkeypatch.setattr(store_file, "BOOT_ID", tmp_path / "hidden")
    assert identity() != identity()

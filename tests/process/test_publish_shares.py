"""Real ranks write their shares of a version into one store, and are killed, stopped or damage something meanwhile."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import ROOT, until

from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest

pytestmark = pytest.mark.process

SCRIPT = str(Path(__file__).with_name("share_member.py"))
PATIENCE_S = 300.0
SOUND, FAULTY = ("plain", "remote", "lora"), ("damaged", "full")  # scenarios that the same processes go through


class Ranks:
    """The processes of a group, and a store for each scenario, which lives as long as this test."""

    def __init__(self, folder: Path, ranks: int, scenarios: Sequence[str]) -> None:
        self.folder, self.stores = folder, {name: StoreFile("/nowhere") for name in scenarios}
        places = {name: file.path for name, file in self.stores.items()}
        (folder / "stores.json").write_text(json.dumps(places))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, SCRIPT, str(folder)]
        self.log = folder / "log"
        with self.log.open("wb") as output:
            self.processes = [
                subprocess.Popen(
                    [*command, str(rank), str(ranks), *scenarios], env=environment, stdout=output, stderr=output
                )
                for rank in range(ranks)
            ]

    def wait(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(PATIENCE_S) for rank in ranks]

    def found(self, name: str, rank: int = 0) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}-{rank}.pt")


@contextmanager
def started(folder: Path, ranks: int, *scenarios: str) -> Iterator[Ranks]:
    group = Ranks(folder, ranks, scenarios)
    try:
        yield group
    finally:
        for process in group.processes:
            process.kill()
        for process in group.processes:
            process.wait(60)
        for file in group.stores.values():
            file.close()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A group that has gone through all scenarios; with three ranks the rows of every tensor are uneven."""
    with started(tmp_path_factory.mktemp("group"), request.param, *SOUND, *FAULTY) as made:
        assert made.wait(*range(request.param)) == [0] * request.param, made.log.read_text()[-4000:]
        yield made


@pytest.mark.parametrize("name", SOUND)
def test_the_store_is_the_one_that_a_single_writer_gives(group: Ranks, name: str) -> None:
    """The same manifest, and so the same digest and checksums, and the same bytes, of the two newest of three versions.

    Adapters of rank 1 have one row, so all ranks but the first have no row of A.
    """
    found, reader = group.found(name), StoreReader(group.stores[name].path)
    assert found["error"] == "" and len(found["expected"]) == 3
    file = StoreFile("/nowhere")
    whole, again = StoreWriter(file.path), StoreReader(file.path)
    for version, tensors in enumerate(found["expected"]):
        expected = whole.publish(version, tensors)
        if version:
            manifest = reader.manifest_of(version)
            assert replace(manifest, published_at=expected.published_at) == expected
            assert digest(reader.tensors(version).items()) == expected.digest
            for bucket in range(len(expected.buckets)):
                assert reader.bucket(version, bucket) == again.bucket(version, bucket)
    adapters = [("lora_" in name) for name, _ in found["expected"][0]]
    assert all(adapters) if name == "lora" else not any(adapters)
    file.close()


def test_only_ranks_on_another_machine_send_their_bytes(group: Ranks) -> None:
    others = list(range(1, len(group.processes)))
    assert (group.found("plain")["senders"], group.found("remote")["senders"]) == ([], others)


def assert_serves_version_0(group: Ranks, name: str) -> None:
    """Version 0 is in service, and a writer that comes next, as after a restart, continues with version 1."""
    path = group.stores[name].path
    reader = StoreReader(path)
    manifest = reader.manifest()
    assert manifest is not None and manifest.version == 0
    tensors = reader.tensors(0)
    assert digest(tensors.items()) == manifest.digest
    StoreWriter(path).publish(1, tensors.items())
    assert reader.manifest_of(1).digest == manifest.digest


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("damaged", "rank 0: the store does not hold what rank 1 has written; no one else may write to it"),
        ("full", "rank 1: weight store: cannot write: File too large"),
    ],
)
def test_a_publication_that_fails_on_one_rank_fails_on_all_in_one_line(group: Ranks, name: str, reason: str) -> None:
    errors = {group.found(name, rank)["error"] for rank in range(len(group.processes))}
    assert errors == {f"weights version 1: not published ({reason})"}
    assert_serves_version_0(group, name)


def test_a_rank_killed_in_the_middle_of_its_share_leaves_the_version_before(tmp_path: Path) -> None:
    with started(tmp_path, 3, "killed") as group:
        assert group.wait(1) == [-9], group.log.read_text()[-4000:]
        for rank in (0, 2):
            until((tmp_path / f"killed-{rank}.pt").exists, f"the error on rank {rank}")
            error = group.found("killed", rank)["error"]
            assert error.startswith("weights version 1: another rank is gone or stuck (") and "\n" not in error
        assert_serves_version_0(group, "killed")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    with started(tmp_path, 2, "stopped") as group:
        until((tmp_path / "stopped-0.pt").exists, "the error on rank 0")
        assert "another rank is gone or stuck" in group.found("stopped")["error"]
        assert_serves_version_0(group, "stopped")

"""Weight stores whose writer is killed with SIGKILL."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest

pytestmark = pytest.mark.process

# Publishes the versions of `weights` below, and kills itself while it publishes the last one.
WRITER = """
import os, signal, sys, torch
from sgpo_async.weights import StoreWriter
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def tensors(version):
    for i in range(10):
        if version == last and i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"t{i}", torch.full((1000,), float(version * 100 + i))
writer = StoreWriter(path, bucket_bytes=4096)
for version in range(first, last + 1):
    writer.publish(version, tensors(version))
"""


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{i}", torch.full((1000,), float(version * 100 + i))) for i in range(10)]


def write_until_killed(path: str, first: int, last: int) -> None:
    result = subprocess.run([sys.executable, "-c", WRITER, path, str(first), str(last)], timeout=120, check=False)
    assert result.returncode == -9


@pytest.fixture
def path() -> Iterator[str]:
    file = StoreFile("/nowhere")
    yield file.path
    file.close()


def test_a_killed_publication_leaves_the_previous_version(path: str) -> None:
    reader = StoreReader(path)
    for first in (0, 3):  # the second writer is killed at the same point as the first
        write_until_killed(path, first, 3)
        manifest = reader.manifest()
        assert manifest is not None
        assert manifest.version == 2
        assert digest(reader.tensors(2).items()) == manifest.digest == digest(weights(2))
    StoreWriter(path, bucket_bytes=4096).publish(3, weights(3))
    assert digest(reader.tensors(3).items()) == digest(weights(3))


# Reads the newest version repeatedly and checks that it is complete and consistent.
READER = """
import sys
from sgpo_async.errors import Superseded
from sgpo_async.weights import StoreReader, digest
reader, last = StoreReader(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    try:
        manifest = reader.manifest()
        if manifest is None:
            continue
        tensors = reader.tensors(manifest.version)
    except Superseded:
        continue
    assert digest(tensors.items()) == manifest.digest, manifest.version
    assert len({tensor[0].item() // 100 for tensor in tensors.values()}) == 1
    if manifest.version == last:
        sys.exit()
"""


def test_a_reader_never_sees_an_incomplete_version(path: str) -> None:
    last = 300
    with subprocess.Popen([sys.executable, "-c", READER, path, str(last)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == b"ready\n"
        writer = StoreWriter(path)
        for version in range(last + 1):
            writer.publish(version, weights(version))
        assert reader.wait(120) == 0

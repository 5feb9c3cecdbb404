"""Shares of several processes: together they write the same store as one process that has everything."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.learner.policy import rows_on
from sgpo_async.weights import Manifest, StoreFile, StoreReader, StoreWriter, shares, store_layout
from sgpo_async.weights.shares import ReadBack, Share, layout, share_of, size_of, write_padding, write_part

Weights = list[tuple[str, torch.Tensor]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
shapes = st.lists(st.integers(0, 7), max_size=3)
plans = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def model(plan: list[tuple[list[int], torch.dtype]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return [(f"t{i}", (torch.rand(s, generator=generator) * 100).to(dtype)) for i, (s, dtype) in enumerate(plan)]


def shares_of(weights: Weights, ranks: int) -> list[Share]:
    tensors = layout((name, tensor.dtype, tensor.shape) for name, tensor in weights)
    return [share_of(tensors, partial(rows_on, rank=rank, ranks=ranks)) for rank in range(ranks)]


def bytes_on(weights: Weights, rank: int, ranks: int) -> bytes:
    """What this rank has: its rows of every tensor, as `torch.chunk` gives them out."""
    parts = []
    for _, tensor in weights:
        chunks = tensor.chunk(ranks) if tensor.dim() else (tensor,)
        rows = chunks[rank] if rank < len(chunks) else torch.empty(0)
        parts.append(rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def publish(fd: int, writer: StoreWriter, version: int, weights: Weights, *, ranks: int, part: int) -> Manifest:
    """Publish as a group of ranks does, the last rank first."""
    tensors = layout((name, tensor.dtype, tensor.shape) for name, tensor in weights)
    data = writer.begin(version, tensors)
    write_padding(fd, data, tensors)
    every = shares_of(weights, ranks)
    for rank in reversed(range(ranks)):
        own = memoryview(bytes_on(weights, rank, ranks))
        assert len(own) == size_of(every[rank])
        for first in range(0, len(own), part):
            write_part(fd, data, every[rank], first, own[first : first + part])
    reading = ReadBack(fd, data, tensors, every, bucket_bytes=writer.bucket_bytes)
    assert sum(reading.blocks()) == sum(tensor.nbytes for _, tensor in weights)
    manifest = reading.manifest(version)
    writer.commit(manifest)
    return manifest


@pytest.fixture
def files() -> Iterator[list[StoreFile]]:
    opened = [StoreFile("/nowhere") for _ in range(2)]
    yield opened
    for file in opened:
        file.close()


@settings(deadline=None, max_examples=100)
@given(
    plan=plans, ranks=st.integers(1, 5), part=st.integers(1, 200), bucket=st.integers(1, 300), block=st.integers(1, 9)
)
def test_the_shares_of_all_ranks_give_the_store_that_one_writer_gives(
    plan: list[tuple[list[int], torch.dtype]], ranks: int, part: int, bucket: int, block: int
) -> None:
    """The same manifest, digest and checksums, and the same bytes, of three versions and so in both slots."""
    files = [StoreFile("/nowhere") for _ in range(2)]
    whole, shared = (StoreWriter(file.path, bucket_bytes=bucket) for file in files)
    store_layout.write(shared._fd, b"\xff" * 8192, store_layout.PAGE)  # left by another model's first publication
    shares.BLOCK_BYTES, default = block, shares.BLOCK_BYTES
    try:
        for version in range(3):
            weights = model(plan, seed=version)
            expected = whole.publish(version, weights)
            found = publish(shared._fd, shared, version, weights, ranks=ranks, part=part)
            assert replace(found, published_at=expected.published_at) == expected
            readers = [StoreReader(file.path) for file in files]
            for index in range(len(expected.buckets)):
                assert readers[0].bucket(version, index) == readers[1].bucket(version, index)
            read = readers[1].tensors(version)
            assert all(torch.equal(read[name], tensor) for name, tensor in weights)
    finally:
        shares.BLOCK_BYTES = default
        for file in files:
            file.close()


@settings(max_examples=200)
@given(st.lists(shapes, min_size=1, max_size=5), st.integers(1, 6))
def test_every_byte_of_a_tensor_is_in_exactly_one_share(sizes: list[list[int]], ranks: int) -> None:
    tensors = layout((f"t{i}", torch.bfloat16, shape) for i, shape in enumerate(sizes))
    every = [share_of(tensors, partial(rows_on, rank=rank, ranks=ranks)) for rank in range(ranks)]
    expected = [byte for entry in tensors for byte in range(entry.offset, entry.offset + entry.nbytes)]
    pieces = [piece for share in every for piece in share]
    assert sorted(b for piece in pieces for b in range(piece.offset, piece.offset + piece.nbytes)) == expected
    for share in every:
        assert [piece.start for piece in share] == [sum(p.nbytes for p in share[:i]) for i in range(len(share))]


def test_the_rows_of_uneven_tensors_are_those_of_torch_chunk() -> None:
    tensors = layout([("five", torch.float32, (5, 2)), ("one", torch.float32, (1,)), ("none", torch.float32, (0, 3))])
    assert [entry.offset for entry in tensors] == [0, 64, 128]
    found = [share_of(tensors, partial(rows_on, rank=rank, ranks=4)) for rank in range(4)]
    spans = [[(p.start, p.offset, p.nbytes) for p in share] for share in found]
    assert spans == [[(0, 0, 16), (16, 64, 4)], [(0, 16, 16)], [(0, 32, 8)], []]
    assert [size_of(share) for share in found] == [20, 16, 8, 0]


@pytest.mark.parametrize("damage", ["torn", "misplaced", "swapped"])
def test_a_write_that_is_torn_or_misplaced_changes_the_hash_of_its_share(files: list[StoreFile], damage: str) -> None:
    weights = [("a", torch.arange(12.0).view(6, 2)), ("b", torch.arange(12.0, 24.0).view(6, 2))]
    writer, ranks = StoreWriter(files[0].path), 2
    publish(writer._fd, writer, 0, weights, ranks=ranks, part=1000)
    tensors, every = layout((n, t.dtype, t.shape) for n, t in weights), shares_of(weights, ranks)

    def hashes() -> list[int]:
        reading = ReadBack(writer._fd, store_layout.PAGE, tensors, every)
        assert sum(reading.blocks()) == 96
        return reading.hashes()

    sound, own = hashes(), memoryview(bytes_on(weights, 1, ranks))
    first, second = every[1]
    if damage == "torn":
        store_layout.write(writer._fd, bytes(4), store_layout.PAGE + second.offset + second.nbytes - 4)
    elif damage == "misplaced":
        store_layout.write(writer._fd, own[:4], store_layout.PAGE + first.offset + 8)
    else:
        for piece, other in ((first, second), (second, first)):
            data = own[other.start : other.start + other.nbytes]
            store_layout.write(writer._fd, data, store_layout.PAGE + piece.offset)
    found = hashes()
    assert found[0] == sound[0] and found[1] != sound[1]


def test_shares_that_leave_bytes_out_are_refused(files: list[StoreFile]) -> None:
    weights = [("a", torch.ones(6))]
    writer = StoreWriter(files[0].path)
    tensors = layout((n, t.dtype, t.shape) for n, t in weights)
    for every in (
        shares_of(weights, 3)[:2],
        shares_of(weights, 3)[1:],
        [*shares_of(weights, 3), *shares_of(weights, 1)],
    ):
        with pytest.raises(AssertionError, match="a: the shares must cover it"):
            list(ReadBack(writer._fd, store_layout.PAGE, tensors, every).blocks())

"""A weight version is divided into broadcasts that SGLang accepts, by a pure function of the manifest."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.weights import BroadcastPlan, Manifest, StoreFile, StoreReader, StoreWriter, TensorEntry, plan_of
from sgpo_async.weights.broadcast_plan import cut
from sgpo_async.weights.digest import tensor_bytes
from sgpo_async.weights.manifest import aligned

DTYPES = {"float32": 4, "bfloat16": 2, "uint8": 1, "int64": 8}
parts = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=12
)
limits = st.integers(1, 200)


def manifest(tensors: list[tuple[str, tuple[int, ...]]], version: int = 0) -> Manifest:
    entries, offset = [], 0
    for n, (dtype, shape) in enumerate(tensors):
        entries.append(TensorEntry(f"t{n}", dtype, shape, offset, math.prod(shape) * DTYPES[dtype]))
        offset += aligned(entries[-1].nbytes)
    return Manifest(version, "d", 0.0, offset, tuple(entries), ())


@given(parts, limits)
def test_every_tensor_is_sent_once_and_in_order(tensors: list, limit: int) -> None:
    whole = manifest(tensors)
    plan = plan_of(whole, limit)
    sent = [t for b in plan.broadcasts for t in zip(b.names, b.dtypes, b.shapes, strict=True)]
    assert sent == [(t.name, t.dtype, t.shape) for t in whole.tensors]


@given(parts, limits)
def test_a_broadcast_is_bounded_and_every_tensor_in_it_is_aligned(tensors: list, limit: int) -> None:
    for piece in cut(manifest(tensors).tensors, limit):
        assert len(piece) == 1 or sum(t.nbytes for t in piece) <= limit
        offset = 0
        for t in piece:
            assert offset % DTYPES[t.dtype] == 0  # required by SGLang
            offset += t.nbytes


@given(parts, limits)
def test_a_new_broadcast_starts_only_where_size_or_alignment_requires_it(tensors: list, limit: int) -> None:
    pieces = list(cut(manifest(tensors).tensors, limit))
    for piece, following in pairwise(pieces):
        nbytes, first = sum(t.nbytes for t in piece), following[0]
        assert nbytes + first.nbytes > limit or nbytes % (DTYPES[first.dtype] if first.nbytes else 16)


@given(parts, limits, st.data())
def test_different_plans_have_different_fingerprints(tensors: list, limit: int, data: st.DataObject) -> None:
    whole = manifest(tensors)
    plan = plan_of(whole, limit)
    assert plan_of(manifest(tensors), limit).fingerprint == plan.fingerprint
    assert plan_of(manifest(tensors, version=1), limit).fingerprint != plan.fingerprint
    assert plan_of(replace(whole, digest="e"), limit).fingerprint != plan.fingerprint
    if tensors:
        n = data.draw(st.integers(0, len(tensors) - 1))
        for changed in ({"name": "other"}, {"dtype": "float16"}, {"shape": (1, *tensors[n][1])}):
            entries = list(whole.tensors)
            entries[n] = replace(entries[n], **changed)
            assert plan_of(replace(whole, tensors=tuple(entries)), limit).fingerprint != plan.fingerprint


@given(parts, limits)
def test_a_plan_is_unchanged_by_a_json_round_trip(tensors: list, limit: int) -> None:
    plan = plan_of(manifest(tensors), limit)
    assert BroadcastPlan.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan


@given(parts, limits)
def test_a_broadcast_contains_the_bytes_of_its_tensors_without_gaps(tensors: list, limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"t{n}": torch.randint(0, 9, shape, generator=generator).to(getattr(torch, dtype))
        for n, (dtype, shape) in enumerate(tensors)
    }
    file = StoreFile("/nowhere")
    try:
        whole = StoreWriter(file.path).publish(3, made.items())
        reader = StoreReader(file.path)
        for piece in cut(whole.tensors, limit):
            into = memoryview(bytearray(sum(t.nbytes for t in piece)))
            reader.copy(3, piece, into)
            assert bytes(into) == b"".join(bytes(tensor_bytes(made[t.name])) for t in piece)
    finally:
        file.close()

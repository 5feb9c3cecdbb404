"""Digests are equal if and only if the weights are equal."""

import numpy as np
import pytest
import torch
import xxhash

from sgpo_async.weights import digest

WEIGHTS = [
    ("layer.weight", torch.arange(12, dtype=torch.float32).reshape(3, 4)),
    ("layer.bias", torch.tensor([1.0, -2.0], dtype=torch.bfloat16)),
    ("scalar", torch.tensor(3, dtype=torch.int64)),
    ("empty", torch.empty(0, 5)),
]


def test_the_digest_is_computed_as_documented() -> None:
    content = np.array([1.5, 2.5], "<f4").tobytes()
    expected = xxhash.xxh3_128(b"a\0float32\0" + b"2\0" + xxhash.xxh3_128_digest(content)).hexdigest()
    assert digest([("a", torch.tensor([1.5, 2.5]))]) == expected


def test_the_digest_does_not_depend_on_order_or_strides() -> None:
    transposed = WEIGHTS[0][1].t().contiguous().t()
    assert not transposed.is_contiguous()
    assert digest(reversed(WEIGHTS)) == digest(WEIGHTS) == digest([("layer.weight", transposed), *WEIGHTS[1:]])


def test_a_parameter_and_its_data_have_the_same_digest() -> None:
    layer = torch.nn.Linear(3, 2)
    assert digest(layer.named_parameters()) == digest(layer.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        [("layer.weigth", WEIGHTS[0][1])],  # another name
        [("layer.weight", WEIGHTS[0][1].reshape(4, 3))],  # another shape
        [("layer.weight", WEIGHTS[0][1].view(torch.int32))],  # another dtype
        [("layer.weight", torch.nextafter(WEIGHTS[0][1], torch.tensor(9.0)))],  # other bits
        [("layer.weight", WEIGHTS[0][1]), ("layer.weight2", WEIGHTS[0][1])],  # an additional tensor
        [],
    ],
)
def test_the_digest_depends_on_every_name_shape_dtype_and_bit(other: list[tuple[str, torch.Tensor]]) -> None:
    assert digest(other) != digest(WEIGHTS[:1])


def test_minus_zero_and_zero_have_different_digests() -> None:
    assert digest([("a", torch.tensor([0.0]))]) != digest([("a", torch.tensor([-0.0]))])

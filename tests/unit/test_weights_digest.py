"""The digest: equal exactly for equal weights."""

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


def test_it_is_what_its_description_says() -> None:
    content = np.array([1.5, 2.5], "<f4").tobytes()
    expected = xxhash.xxh3_128(b"a\0float32\0" + b"2\0" + xxhash.xxh3_128_digest(content)).hexdigest()
    assert digest([("a", torch.tensor([1.5, 2.5]))]) == expected


def test_order_and_strides_do_not_matter() -> None:
    transposed = WEIGHTS[0][1].t().contiguous().t()
    assert not transposed.is_contiguous()
    assert (
        digest(reversed(WEIGHTS)) == digest(WEIGHTS) == digest([("layer.weight", transposed), *WEIGHTS[1:]])
    )


def test_a_parameter_counts_as_its_data() -> None:
    layer = torch.nn.Linear(3, 2)
    assert digest(layer.named_parameters()) == digest(layer.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        [("layer.weigth", WEIGHTS[0][1])],  # another name
        [("layer.weight", WEIGHTS[0][1].reshape(4, 3))],  # another shape
        [("layer.weight", WEIGHTS[0][1].view(torch.int32))],  # another dtype
        [("layer.weight", torch.nextafter(WEIGHTS[0][1], torch.tensor(9.0)))],  # other bits
        [("layer.weight", WEIGHTS[0][1]), ("layer.weight2", WEIGHTS[0][1])],  # one more
        [],
    ],
)
def test_anything_else_matters(other: list[tuple[str, torch.Tensor]]) -> None:
    assert digest(other) != digest(WEIGHTS[:1])


def test_minus_zero_is_not_zero() -> None:
    assert digest([("a", torch.tensor([0.0]))]) != digest([("a", torch.tensor([-0.0]))])

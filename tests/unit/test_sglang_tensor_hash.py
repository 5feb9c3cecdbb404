"""SGLang's hashes, compared with values computed by SGLang's own code."""

import pytest
import torch

from sgpo_async.engines.sglang.weight_sync.tensor_hash import cpu_hash, cuda_hash

BFLOAT16 = (torch.arange(60003) % 251).to(torch.bfloat16)

# Computed by the Triton kernels of sglang 0.5.23 (sglang/kernels/ops/memory/gpu_tensor_hash.py) in the interpreter of
# triton 3.7.0 (TRITON_INTERPRET=1) on CPU tensors, with the same calls as in `gpu_tensor_hash`.
KERNEL = {
    "7b9d126d63bd5f7f": torch.arange(7, dtype=torch.float32),
    "734f38267db36804": torch.arange(5, dtype=torch.bfloat16),
    "bacd02a76ac1ad36": torch.arange(6, dtype=torch.uint8),
    "bd3bf69e6ae40122": torch.arange(8192, dtype=torch.float32),
    "a41ee57619aa30ab": torch.arange(8193, dtype=torch.float32),
    "a2077194680205b9": torch.arange(50000, dtype=torch.float32),
    "0047eb09d57a4f0c": BFLOAT16.reshape(3, 20001),
    "bcfe57824b6c9424": torch.zeros(9),
    "0000000000000000": torch.zeros(0),
    "4a92c412b51c9061": torch.arange(8192 * 1025 + 3, dtype=torch.int32),  # more tiles than fit into one reduction
}


@pytest.mark.parametrize("golden", KERNEL)
def test_the_cuda_hash_equals_the_kernels_hash(golden):
    assert cuda_hash(KERNEL[golden]) == golden


@pytest.mark.parametrize("tensor", [torch.tensor([0.0, 1.0]), torch.tensor([0, 0, 0, 1.0], dtype=torch.bfloat16)])
def test_the_cpu_hash_is_the_start_of_the_sha256_of_the_bytes(tensor):
    assert cpu_hash(tensor) == "22b6f43bd8d27738"  # printf '\\0\\0\\0\\0\\0\\0\\200\\77' | sha256sum


@pytest.mark.parametrize("hash_of", [cpu_hash, cuda_hash])
def test_a_hash_depends_on_the_order_of_elements_and_not_on_the_memory_layout(hash_of):
    columns = torch.arange(30_000.0).reshape(100, 300)[:, 5:150]
    assert hash_of(columns) == hash_of(columns.contiguous()) != hash_of(columns.T)


@pytest.mark.parametrize("hash_of", [cpu_hash, cuda_hash])
@pytest.mark.parametrize("index", [0, 8191, 8192, 8192 * 8, 99_998, 99_999])
def test_a_hash_changes_with_one_bit_of_one_element(hash_of, index):
    tensor = torch.arange(100_000, dtype=torch.int32)
    before = hash_of(tensor)
    tensor[index] ^= 1
    assert hash_of(tensor) != before

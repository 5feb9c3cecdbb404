"""SGLang servers on a GPU, with random weights in the shape of Qwen2.5-1.5B in bfloat16.

The tests are skipped without a GPU or without a Python environment for the servers: docs/gpu.md. To measure, run
`measure_servers.py`.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from gpu_servers import PYTHON, Learner, Served, devices, save, visible
from measure_servers import mismatch
from shapes import SHAPES

from sgpo_async.engines.sglang.weight_sync.layout import answered_checksums, compare, expected_checksums
from sgpo_async.errors import WeightsError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sglang,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"no environment for SGLang servers: {PYTHON} (docs/gpu.md)"),
]

SHAPE = "qwen2.5-1.5b"
MISMATCH_BOUND = 0.05  # nats, the bound of the mismatch alarm for bfloat16 (learner.mismatch_bound)

Model = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The folder and the weights of the model."""
    torch.cuda.init()  # before CUDA_VISIBLE_DEVICES is changed for the servers
    folder = tmp_path_factory.mktemp("model")
    yield folder, save(SHAPE, folder, dtype="bfloat16")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_gpu_server_has_the_weights_that_were_sent(model: Model, tmp_path: Path, transport: str, tp: int) -> None:
    """Layout and hash on a GPU, with weights sent over HTTP and NCCL: each version has the expected checksums."""
    folder, tensors = model
    nccl = transport == "distributed"
    if len(devices()) < tp + nccl:
        pytest.skip(f"needs {tp + nccl} GPUs, this machine has {len(devices())}")
    config = json.loads((folder / "config.json").read_text())
    with ExitStack() as stack:
        learner = stack.enter_context(closing(Learner(tensors, tmp_path, cuda=nccl)))
        stack.enter_context(visible(devices()[nccl:]))
        served = Served(
            folder, tmp_path / "server", device="cuda", dtype="bfloat16", slots=16, tp=tp, transport=transport
        )
        stack.enter_context(closing(served))
        answers = []
        for version in range(3):
            served.load(learner.publish(version))
            sent = learner.tensors_of(version)
            expected = expected_checksums(sent, config, tp=tp, dtype=torch.bfloat16, device="cuda")
            answers.append(checksums(served.engine.server_slots[0].url))
            compare(expected, answers[-1])
        assert [update.transport for update in served.engine.updates] == [transport] * 3
        with pytest.raises(WeightsError, match="differ from what was sent"):
            compare(answers[0], answers[1])


def test_bfloat16_logprobs_are_close_to_the_learners(model: Model, tmp_path: Path) -> None:
    folder, tensors = model
    with (
        closing(Learner(tensors, tmp_path, cuda=False)) as learner,
        closing(Served(folder, tmp_path / "server", device="cuda", dtype="bfloat16", slots=16)) as served,
    ):
        served.load(learner.publish(0))
        measured = mismatch(served, folder, "cuda", vocabulary=SHAPES[SHAPE]["vocab_size"])
    assert 0 < measured["bfloat16"]["mean"] < MISMATCH_BOUND, measured


def checksums(url: str) -> list[dict[str, str]]:
    """The checksums that a server reports."""
    body = json.dumps({"action": "checksum"}).encode()
    request = urllib.request.Request(f"{url}/weights_checker", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answered_checksums(json.loads(answer.read()))

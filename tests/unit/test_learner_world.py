"""On which device a node's ranks run."""

import pytest

from sgpo_async.learner.process_group import device_for


@pytest.mark.parametrize(
    ("gpus", "ranks", "device"), [(0, 2, "cpu"), (1, 2, "cpu"), (1, 1, "cuda"), (2, 2, "cuda"), (8, 2, "cuda")]
)
def test_ranks_share_no_gpu(gpus: int, ranks: int, device: str) -> None:
    assert device_for(gpus=gpus, ranks=ranks) == device


def test_idle_gpus_are_told(caplog: pytest.LogCaptureFixture) -> None:
    device_for(gpus=1, ranks=2)
    assert "start at most 1" in caplog.text

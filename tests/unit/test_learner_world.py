"""The choice between GPU and CPU for the ranks of a node."""

import pytest

from sgpo_async.learner.process_group import device_for


@pytest.mark.parametrize(
    ("gpus", "ranks", "device"), [(0, 2, "cpu"), (1, 2, "cpu"), (1, 1, "cuda"), (2, 2, "cuda"), (8, 2, "cuda")]
)
def test_ranks_use_gpus_only_if_each_rank_has_its_own(gpus: int, ranks: int, device: str) -> None:
    assert device_for(gpus=gpus, ranks=ranks) == device


def test_gpus_that_cannot_be_used_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    device_for(gpus=1, ranks=2)
    assert "2 ranks use the CPU; start at most 1 ranks to use the GPUs of this node" in caplog.text

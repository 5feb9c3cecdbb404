"""What every test has: one thread for each process, and no test that a slow machine can fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several tests run side by side

import hypothesis
import pytest

hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as a learner's world of one rank, on the CPU."""
    import torch.distributed as dist

    from sgpo_async.learner.process_group import join_alone

    join_alone()
    yield
    dist.destroy_process_group()

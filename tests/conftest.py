"""Settings and fixtures for all tests: one thread per process, and no time limit that a slow machine can miss."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several tests run side by side

import hypothesis
import pytest

hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of which this process is the only rank, on the CPU."""
    import torch.distributed as dist

    from sgpo_async.learner.process_group import join_alone

    join_alone()
    yield
    dist.destroy_process_group()

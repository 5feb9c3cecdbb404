"""The device of the ranks of a node, the name of an attempt, and the ranks that share the parameters."""

import hashlib
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch.distributed as dist

from sgpo_async.config.schema import Learner
from sgpo_async.errors import ConfigError, DeadlineExceeded
from sgpo_async.learner.process_group import agree, device_for, mesh_of


@pytest.mark.parametrize(
    ("gpus", "ranks", "device"), [(0, 2, "cpu"), (1, 2, "cpu"), (1, 1, "cuda"), (2, 2, "cuda"), (8, 2, "cuda")]
)
def test_ranks_use_gpus_only_if_each_rank_has_its_own(gpus: int, ranks: int, device: str) -> None:
    assert device_for(gpus=gpus, ranks=ranks) == device


def test_gpus_that_cannot_be_used_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    device_for(gpus=1, ranks=2)
    assert "2 ranks use the CPU; start at most 1 ranks to use the GPUs of this node" in caplog.text


def _left_by(attempt: int, ranks: int) -> dict[str, str]:
    """The keys that an earlier attempt, which was complete, left in the store."""
    tokens = " ".join(f"old-{attempt}-{rank}" for rank in range(ranks))
    name = hashlib.sha256(tokens.encode()).hexdigest()[:32]
    announced = {f"token/{rank}": f"old-{attempt}-{rank}" for rank in range(ranks)}
    confirmed = {f"confirmed/{rank}": name for rank in range(ranks)}
    return announced | confirmed | {"proposal": tokens, "agreed": name}


@pytest.mark.parametrize("late", [None, 0, 1, 2])
def test_an_attempt_has_a_new_name_that_all_its_ranks_know(late: int | None) -> None:
    """Whatever an earlier attempt has left in the store, and whichever rank comes when the others are long there."""
    store, names = dist.HashStore(), []
    for attempt in range(3):
        for key, value in _left_by(attempt, 3).items():
            store.set(key, value)
        first = [rank for rank in range(3) if rank != late]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(agree, store, rank, 3, timeout_s=120) for rank in first]
            if late is not None:
                wait(waiting, timeout=0.2)
                assert not any(one.done() for one in waiting)
                waiting.append(pool.submit(agree, store, late, 3, timeout_s=120))
            found = {one.result(120) for one in waiting}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3


def test_an_attempt_without_all_its_ranks_ends_at_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match=r"learner rank 0: .*start of all 2 ranks"):
        agree(dist.HashStore(), 0, 2, timeout_s=0.1)


@pytest.mark.parametrize(
    ("over", "ranks", "here", "shards"),
    [
        ("auto", 8, 8, 8),
        ("auto", 16, 8, 8),
        ("auto", 2, 1, 2),
        ("node", 16, 8, 8),
        ("node", 2, 1, 1),
        ("world", 16, 8, 16),
    ],
)
def test_ranks_that_divide_the_parameters(over: str, ranks: int, here: int, shards: int) -> None:
    assert Learner(shard_over=over).shards(ranks=ranks, here=here) == shards


@pytest.mark.parametrize("over", ["auto", "node"])
def test_nodes_of_different_size_cannot_have_the_same_shards(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(counts: list[int], _: int) -> None:
        counts[:] = [2, 2, 1]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(ConfigError) as caught:
        mesh_of(Learner(shard_over=over), "cpu", timeout_s=1)
    message = "learner.shard_over must be world if nodes have different numbers of ranks (1 to 2), got "
    assert str(caught.value) == message + repr(over)

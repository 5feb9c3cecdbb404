"""Publication by one rank; groups of ranks are in tests/process/test_publish_shares.py."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from sgpo_async.config.schema import Lora
from sgpo_async.errors import DeadlineExceeded, WeightsError
from sgpo_async.learner import publish
from sgpo_async.learner.loading import prepare
from sgpo_async.learner.policy import Policy
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.publish import Publisher, gather_trained
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, TensorEntry, digest
from tests.reference import learner_cases as cases


class LateStore(StoreWriter):
    """A store that begins a version only when `open` is set, and then a little later."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.open = threading.Event()

    def begin(self, version: int, tensors: Sequence[TensorEntry]) -> int:
        self.open.wait(60)
        time.sleep(0.2)
        return super().begin(version, tensors)


@pytest.fixture
def path() -> Iterator[str]:
    file = StoreFile("/nowhere")
    yield file.path
    file.close()


def policy(*, lora: int = 0, tied: bool = False, offload: bool = False) -> Policy:
    run = cases.settings()
    learner = replace(run.learner, precision="float32", lora=Lora(rank=lora), offload_weights=offload)
    return prepare(
        Policy(cases.tiny_model(dtype=torch.float32, tied=tied)), replace(run, learner=learner), join_alone()
    )


def change(trained: Policy) -> None:
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


def expected(trained: Policy, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(gather_trained(trained, dtype))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"lora": 2}, {"offload": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_versions_are_what_is_trained_when_they_are_published(path: str, options: dict, dtype: torch.dtype) -> None:
    """Also a second one, from the same buffer, while the parameters change further."""
    trained, told = policy(**options), []
    publisher = Publisher(trained, dtype, store=StoreWriter(path), published=lambda *of: told.append(of[0]))
    reader, buffer, wanted = StoreReader(path), publisher._buffer.data_ptr(), []
    for version in range(2):
        wanted.append(expected(trained, dtype))
        publisher.publish(version)
        change(trained)
    publisher.close()
    assert told == [0, 1] and publisher._buffer.data_ptr() == buffer
    for version, tensors in enumerate(wanted):
        found = reader.tensors(version)
        assert list(found) == list(tensors)
        assert all(found[name].dtype == dtype and torch.equal(found[name], own) for name, own in tensors.items())
        assert reader.manifest_of(version).digest == digest(tensors.items())
    names = list(wanted[0])
    assert all("lora_" in name for name in names) == ("lora" in options)
    assert ("lm_head.weight" in names) == (not options or "offload" in options)


def test_the_buffer_is_not_overwritten_before_the_version_in_it_is_in_the_store(path: str) -> None:
    trained, store = policy(), LateStore(path)
    publisher = Publisher(trained, torch.float32, store=store, published=lambda *_: None)
    first = expected(trained, torch.float32)
    publisher.publish(0)
    change(trained)
    store.open.set()
    publisher.publish(1)
    publisher.wait()
    assert all(torch.equal(StoreReader(path).tensors(0)[name], tensor) for name, tensor in first.items())


def test_the_next_call_raises_the_error_of_a_publication(path: str) -> None:
    trained = policy()
    publisher = Publisher(trained, torch.float32, store=StoreWriter(path), published=lambda *_: None)
    publisher.publish(3)
    publisher.publish(3)
    reason = "weights version must be > 3, the newest version in the store, got 3"
    with pytest.raises(WeightsError, match=rf"^weights version 3: not published \(rank 0: {reason}\)$"):
        publisher.publish(4)
    publisher.publish(5)
    publisher.close()
    assert StoreReader(path).version() == 5


def test_a_publication_without_progress_is_given_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "PUBLISH_S", 0.05)
    store = LateStore(path)
    publisher = Publisher(policy(), torch.float32, store=store, published=lambda *_: None)
    publisher.publish(0)
    with pytest.raises(DeadlineExceeded, match="progress of a weight publication within 0.05 s"):
        publisher.wait()
    store.open.set()

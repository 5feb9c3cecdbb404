"""One step on one rank: packed loss and gradient against Eq. 7 taken sequence by sequence, in float64."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sgpo_async.config.schema import Correction, Run
from sgpo_async.learner.batch import from_shard
from sgpo_async.wire.records import Rollout
from tests.reference import learner_cases as cases

MODES = ("none", "token", "token-mask", "prefix", "sequence", "sequence-geometric")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(
    run: Run, parts: list[list[Rollout]], *, tied: bool = False, frozen: bool = False
) -> tuple[float, dict[str, Tensor]]:
    stepper = cases.stepper(run, cases.tiny_model(tied=tied), cases.tiny_model(seed=1) if frozen else None)
    batch = from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm)
    loss = stepper.accumulate(batch).reduce()["loss"]
    return loss, {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}


def expected(
    run: Run, parts: list[list[Rollout]], *, tied: bool = False, frozen: bool = False
) -> tuple[float, dict[str, Tensor]]:
    model = cases.tiny_model(tied=tied)
    loss = cases.reference_loss(model, parts, run, teacher=cases.tiny_model(seed=1) if frozen else None)
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: tuple[float, dict[str, Tensor]], right: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(right[0], abs=1e-10)
    assert found[1].keys() == right[1].keys()
    for name, gradient in right[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("row_tokens", [1, 20, 40, 10_000])
def test_packed_loss_and_gradient_equal_one_by_one(tied: bool, row_tokens: int) -> None:
    run, parts = cases.settings(row_tokens=row_tokens, delta=2.0), cases.groups()
    right = expected(run, parts, tied=tied)
    assert max(float(g.abs().max()) for g in right[1].values()) > 1e-3
    assert_equal(gradients(run, parts, tied=tied), right)


@pytest.mark.parametrize("mode", MODES)
def test_every_correction(mode: str) -> None:
    rule = Correction(mode=mode, bound=2.0)
    run, parts = cases.settings(grpo_correction=rule, kl_correction=rule, delta=2.0), cases.groups(seed=3)
    assert_equal(gradients(run, parts), expected(run, parts))

"""Teachers on one rank: the weights of each copy after some steps, its distillation loss, and its checkpoints."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from sgpo_async.config.schema import Run
from sgpo_async.errors import CheckpointError
from sgpo_async.learner import checkpoint, policy
from sgpo_async.learner.checkpoint import Saved
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.train import build
from tests.reference import learner_cases as cases
from tests.reference.objectives import reference_loss

pytestmark = pytest.mark.usefixtures("one_rank")

KINDS: dict[str, dict[str, Any]] = {
    "self": {"teacher": "self"},
    "ema": {"teacher": "ema", "teacher_decay": 0.7},
    "snapshot": {"teacher": "snapshot", "teacher_every": 3},
    "frozen": {"teacher": "frozen"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **keys: Any) -> Run:
    return cases.settings(limiter="none", **KINDS[kind], **keys)


def learner(run: Run, dtype: torch.dtype = torch.float64) -> Stepper:
    model = cases.tiny_model(dtype=dtype)
    return cases.stepper(run, model, deepcopy(model) if run.algorithm.copies_teacher else None)


def update(stepper: Stepper, step: int) -> dict[str, Any]:
    return stepper.update(cases.shard_of(cases.groups(seed=step), problems=4, step=step))


def whole(policy: Any) -> dict[str, Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in policy.model.named_parameters()}


def model_of(weights: dict[str, Tensor]) -> PreTrainedModel:
    model = cases.tiny_model()
    model.load_state_dict(weights)
    return model


@kinds
@pytest.mark.parametrize("large", [False, True])
def test_each_step_distils_from_the_expected_weights(kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected weights are computed by plain arithmetic; `large` uses one FSDP group per layer."""
    monkeypatch.setattr(policy, "GROUP_BYTES", 0 if large else policy.GROUP_BYTES)
    run = settings(kind)
    stepper, student = learner(run), dict(cases.tiny_model().named_parameters())
    copy = {name: p.detach().clone() for name, p in student.items()}
    for step in range(5):
        teacher = model_of(copy) if kind != "self" else None
        loss = reference_loss(model_of(student), cases.groups(seed=step), run, teacher=teacher).item()
        assert update(stepper, step)["loss"] == pytest.approx(loss, abs=1e-9)
        student = whole(stepper.policy)
        if kind == "ema":
            copy = {name: 0.7 * copy[name] + 0.3 * student[name] for name in copy}
        if kind == "snapshot" and step + 1 == 3:
            copy = student
        if stepper.teacher.copy:
            stepper.teacher.copy.reshard()
            for name, tensor in whole(stepper.teacher.copy).items():
                torch.testing.assert_close(tensor, copy[name], atol=1e-14, rtol=0)


def save(folder: Path, step: int, stepper: Stepper) -> Path:
    """Write a checkpoint; return its folder."""
    with checkpoint.CheckpointWriter(folder, keep=1) as writer:
        writer.save(
            step=step,
            module=stepper.policy,
            optimiser=stepper.optimiser,
            saved=Saved({}, b""),
            teacher=stepper.teacher.moving,
        )
    path = checkpoint.newest_whole(folder)
    assert path is not None
    return path


@kinds
def test_a_resumed_run_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run = settings(kind)
    uninterrupted = learner(run, torch.float32)
    lines = [update(uninterrupted, step) for step in range(5)]
    first = learner(run, torch.float32)
    before = [update(first, step) for step in range(2)]
    path = save(tmp_path, 2, first)
    second = learner(run, torch.float32)
    checkpoint.restore(path, module=second.policy, optimiser=second.optimiser, teacher=second.teacher.moving)
    assert before + [update(second, step) for step in range(2, 5)] == lines


def test_a_checkpoint_without_the_teacher_is_rejected(tmp_path: Path) -> None:
    old, new = learner(settings("frozen"), torch.float32), learner(settings("ema"), torch.float32)
    path = save(tmp_path, 1, old)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint, or it belongs to another model, teacher"):
        checkpoint.restore(path, module=new.policy, optimiser=new.optimiser, teacher=new.teacher.moving)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["snapshot", "frozen"])
def test_the_copy_has_the_configured_dtype(kind: str, dtype: str) -> None:
    """With the shipped policy, a copy in bfloat16 gives nearly the same loss in half the memory."""
    run = settings(kind, teacher_dtype=dtype)
    mesh = init_device_mesh("cpu", (1,))
    stepper, _ = build(run, mesh)
    copy = stepper.teacher.copy
    assert copy is not None
    assert {p.dtype for p in copy.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in copy.parameters())
    size = {"float32": 4, "bfloat16": 2}[dtype]
    lines = [update(stepper, step) for step in range(3)]  # afterwards parameters may remain gathered in float32
    assert stepper.teacher.nbytes == size * sum(p.numel() for p in stepper.policy.parameters())
    exact, _ = build(settings(kind), mesh)
    for line, expected in zip(lines, [update(exact, step) for step in range(3)], strict=True):
        assert line["kd_loss"] == pytest.approx(expected["kd_loss"], rel=0.05)
        assert (line == expected) == (dtype == "float32")
    copy.reshard()
    if kind == "snapshot":
        for name, tensor in whole(stepper.policy).items():
            assert torch.equal(copy.model.get_parameter(name).full_tensor(), tensor.to(getattr(torch, dtype)))


def test_objectives_without_distillation_keep_no_copy() -> None:
    for keys in ({"objective": "grpo"}, {"divergence": "sft"}):
        stepper, _ = build(settings("frozen", **keys), init_device_mesh("cpu", (1,)))
        assert (stepper.teacher.copy, stepper.teacher.nbytes) == (None, 0)

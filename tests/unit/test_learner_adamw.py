"""AdamW with moments of 4 and about 2 bytes against torch's with 8: steps, memory, what rounding does, checkpoints."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sgpo_async.config.schema import Optim
from sgpo_async.errors import CheckpointError
from sgpo_async.learner import adamw, checkpoint, optimiser
from sgpo_async.learner.adamw import FORMS
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.step import Stepper
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")

COMPACT = ("bfloat16", "int8")


def network(width: int = 300) -> nn.Module:
    """Two layers with `width` inputs, which is not a multiple of a block."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))
    fully_shard(layers, mesh=init_device_mesh("cpu", (1,)))
    return layers


def local(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.to_local().flatten() for p in module.parameters() if isinstance(p, DTensor)]).detach().clone()


def regression(optim: Optim, steps: int = 200) -> tuple[Tensor, float]:
    """The change of all parameters by a regression, and the mean loss of the last 20 steps."""
    layers = network()
    adam, before = optimiser.build(layers, optim), local(layers)
    inputs = torch.randn(512, 300)
    outputs = torch.sin(inputs @ torch.randn(300, 300) / 17)
    losses = []
    for _ in range(steps):
        some = torch.randint(0, 512, (64,))
        loss = (layers(inputs[some]) - outputs[some]).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return local(layers) - before, sum(losses[-20:]) / 20


@pytest.mark.parametrize(("state", "tolerance"), [("bfloat16", 0.01), ("int8", 0.05)])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_200_steps_are_those_of_float32_within_a_tolerance(state: Any, tolerance: float, beta2: float) -> None:
    """The tolerance is of the distance that float32 has gone."""
    exact = Optim(lr=3e-3, beta2=beta2, weight_decay=0.01)
    (expected, loss), (found, other) = regression(exact), regression(replace(exact, state=state))
    assert (found - expected).norm() < tolerance * expected.norm()
    assert other == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("state", COMPACT)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_rows_are_computed_in_parts_of_any_size(state: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers for rounding may then be others; all else is equal."""
    optim = Optim(lr=3e-3, state=state)
    whole, _ = regression(optim, steps=5)
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    found, _ = regression(optim, steps=5)
    assert (found - whole).norm() < 0.1 * whole.norm()


def test_two_moments_take_4_and_2_bytes_of_a_parameter() -> None:
    """Of int8 there are two scales of 4 bytes for each block of 256; vectors have bfloat16."""
    matrix, vectors = 2 * 64 * 512, 64 + 512
    exact = {"bfloat16": 4 * (matrix + vectors), "int8": 2 * matrix + 2 * 4 * matrix // 256 + 4 * vectors}
    for state, nbytes in exact.items():
        layers = network(512)
        layers[1] = nn.Identity()
        layers[2].weight.grad = torch.zeros_like(layers[2].weight)
        optim = Optim(state=state)  # type: ignore[arg-type]
        adam = optimiser.build(layers, optim)
        layers(torch.zeros(1, 512)).sum().backward()
        adam.step()
        found = sum(value.to_local().nbytes for own in adam.state.values() for value in own.values())
        # The second matrix has rows of 64 values, each a block of its own.
        assert found == nbytes + (0 if state == "bfloat16" else 8 * 512 - 8 * 512 * 64 // 256)
        assert optim.state_bytes == {"bfloat16": 4, "int8": 2 + 8 / 256}[state]


def stored(form: str, m: Tensor, v: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Both moments after they were written and read."""
    columns = FORMS[form].columns(m.shape[1])
    tensors = {name: torch.zeros(len(m), width, dtype=dtype) for name, (width, dtype) in columns.items()}
    FORMS[form].write(tensors, m.clone(), v.clone(), torch.Generator().manual_seed(seed))
    return FORMS[form].read(tensors)


def moments() -> tuple[Tensor, Tensor]:
    """Moments [40, 300] of gradients whose sizes range over four decades within a block."""
    generator = torch.Generator().manual_seed(1)
    size = 10 ** (4 * torch.rand(40, 300, generator=generator) - 6)
    v = size.square()
    return torch.randn(40, 300, generator=generator) * size, v


@pytest.mark.parametrize(("form", "step"), [("bfloat16", 2**-7), ("int8", 32 / 255 * math.log(2))])
def test_a_stored_second_moment_is_one_of_its_neighbours(form: str, step: float) -> None:
    m, v = moments()
    assert ((stored(form, m, v)[1] / v).log().abs() <= step * 1.01).all()


def test_a_stored_first_moment_is_off_by_a_fraction_of_the_largest_step() -> None:
    """Also where it is ten thousand times smaller than its neighbours in the block."""
    m, v = moments()
    for form, bound in (("bfloat16", 2**-8), ("int8", 1 / 250)):
        found, square = stored(form, m, v)
        assert ((found - m) / square.sqrt()).abs().max() < bound * (m / square.sqrt()).abs().max()


@pytest.mark.parametrize("form", COMPACT)
def test_moments_of_0_stay_0_and_everything_stays_finite(form: str) -> None:
    zero = torch.zeros(3, 300)
    assert all((value == 0).all() for value in stored(form, zero, zero))
    m, v = torch.full((2, 300), 1e-25), torch.full((2, 300), 1e-44)
    m[0, 0], v[0, 0] = 1e10, 1e20
    for value in stored(form, m, v):
        assert value.isfinite().all()


@pytest.mark.parametrize("form", COMPACT)
def test_a_second_moment_is_right_on_average(form: str) -> None:
    """Each step takes 0.1 % of it away, less than half the distance to the next smaller value."""
    m, v = torch.zeros(1, 4096), torch.full((1, 4096), 1.3e-6)
    v[:, ::256] = 1e-4  # the largest of its block, which has a scale of its own
    small = torch.ones(4096, dtype=torch.bool)
    small[::256] = False
    first = v[0, small].mean()
    for number in range(300):
        _, v = stored(form, m, 0.999 * v + 0.001 * 1e-4 * ~small, number)
    assert v[0, small].mean() / first == pytest.approx(0.999**300, rel=0.05)


@pytest.mark.parametrize("state", COMPACT)
def test_steps_are_reproducible_bit_for_bit(state: Any) -> None:
    optim = Optim(lr=3e-3, state=state)
    first = regression(optim, steps=3)[0]
    torch.rand(7)  # their random numbers depend on nothing but the step
    assert torch.equal(first, regression(optim, steps=3)[0])


def learner(state: str) -> Stepper:
    run = cases.settings()
    return cases.stepper(
        replace(run, optim=replace(run.optim, state=state)),  # type: ignore[arg-type]
        cases.tiny_model(dtype=torch.float32),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    def save(state: str) -> Path:
        stepper = learner(state)
        stepper.update(cases.shard_of(cases.groups(), problems=4))
        with CheckpointWriter(tmp_path, keep=1) as writer:
            parts = {"module": stepper.policy, "optimiser": stepper.optimiser}
            writer.save(step=1, saved=Saved({}, b""), **parts)  # type: ignore[arg-type]
        return tmp_path / "step-00000001"

    return save


@pytest.mark.parametrize(("before", "after"), [("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float32")])
def test_a_checkpoint_with_other_moments_is_refused_in_one_line(
    before: str, after: str, saved: Callable[[str], Path]
) -> None:
    path, stepper = saved(before), learner(after)
    with pytest.raises(
        CheckpointError, match="it belongs to another model, teacher, optim.state or learner.lora"
    ) as caught:
        checkpoint.restore(path, module=stepper.policy, optimiser=stepper.optimiser)
    assert "\n" not in str(caught.value)

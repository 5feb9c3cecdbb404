"""Options that save memory or time: steps, weights and checkpoints equal those without them, on 1 and 2 gloo ranks."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sgpo_async.config.schema import Run
from sgpo_async.learner import checkpoint, compiling, loading, optimiser, policy, step
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.publish import gather
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from tests.reference import learner_cases as cases

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # on a busy machine the setup alone takes minutes

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {  # keys of learner, and optim.state
    "none": ({}, "float32"),
    "offload_activations": ({"recompute": 1, "offload_activations": True}, "float32"),
    "offload_weights": ({"offload_weights": True}, "float32"),
    "both": ({"recompute": 2, "offload_activations": True, "offload_weights": True}, "float32"),
    "bfloat16": ({}, "bfloat16"),
    "int8": ({"offload_weights": True}, "int8"),
    "compile": ({"compile": True, "recompute": 1}, "float32"),
}
FAST = [name for name in OPTIONS if name != "compile"]  # compiling takes minutes
NAMES = [*FAST, pytest.param("compile", marks=pytest.mark.slow)]
Found = Callable[[str], dict[int, Any]]  # name of an option -> what was found, by number of ranks
RUN = cases.settings(row_tokens=20, teacher="ema", teacher_decay=0.7)


def worker(rank: int, root: Path, ranks: int, names: Sequence[str]) -> None:
    """Train with each of these options; rank 0 writes the results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store-{names[-1]}-{ranks}", rank=rank, world_size=ranks)
    policy.GROUP_BYTES = step.LOCAL_GRADIENT_BYTES = 0  # one FSDP group per layer, as for large models
    compiling.BACKEND, loading.require_compiler = "aot_eager", lambda _: None  # which needs none
    found = {name: trained(name, root) for name in names}
    if rank == 0:
        torch.save(found, root / f"found-{names[-1]}-{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(name: str, root: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, two more steps; these two once more from the checkpoint, and from that of one rank."""
    keys, state = OPTIONS[name]
    run = replace(RUN, learner=replace(RUN.learner, **keys), optim=replace(RUN.optim, state=state))
    stepper, folder = learner(run, root), root / f"{name}-{dist.get_world_size()}"
    lines = update(stepper, range(3))
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(step=3, saved=Saved({}, b""), **stateful(stepper))
    saved = moments(stepper)
    lines += update(stepper, range(3, 5))
    again = learner(run, root)
    checkpoint.restore(folder / "step-00000003", **stateful(again))
    update(again, range(3, 5))
    other = learner(run, root)
    checkpoint.restore(root / f"{name}-1" / "step-00000003", **stateful(other))
    restored = moments(other)
    update(other, range(3, 5))
    devices = {p.device.type for own in (stepper.policy, stepper.teacher.copy) if own for p in own.parameters()}
    weights = [dict(gather(own.policy)) for own in (stepper, again, other)]
    return {"lines": lines, "weights": weights, "devices": devices, "saved": saved, "restored": restored}


def moments(stepper: Stepper) -> list[dict[str, Tensor]]:
    """Whole tensors of AdamW's state, by parameter."""
    states = [stepper.optimiser.state[parameter] for parameter in stepper.policy.parameters()]
    return [
        {name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()}
        for state in states
    ]


def stateful(stepper: Stepper) -> dict[str, Any]:
    return {"module": stepper.policy, "optimiser": stepper.optimiser, "teacher": stepper.teacher.moving}


def learner(run: Run, root: Path) -> Stepper:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    loaded = loading.load_policy(str(root / "model"), run, mesh)
    teacher = Teacher(run.algorithm, loading.load_teacher(str(root / "model"), run, mesh))
    return Stepper(run, loaded, optimiser.build(loaded, run.optim), teacher)


def update(stepper: Stepper, steps: range) -> list[dict[str, Any]]:
    """Train on the rollouts of four problems, which are divided among the ranks."""
    lines = []
    for number in steps:
        parts = cases.groups(seed=number)[dist.get_rank() :: dist.get_world_size()]
        lines.append(stepper.update(cases.shard_of(parts, problems=4, step=number)))
    return lines


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("options")
    cases.tiny_model(dtype=torch.float32, exact=False).save_pretrained(root / "model")

    @functools.cache
    def train(*names: str) -> dict[int, dict[str, Any]]:
        for ranks in (1, 2):
            mp.spawn(worker, args=(root, ranks, names), nprocs=ranks)
        files = {ranks: root / f"found-{names[-1]}-{ranks}.pt" for ranks in (1, 2)}
        return {ranks: torch.load(file, weights_only=False) for ranks, file in files.items()}

    def of(name: str) -> dict[int, Any]:
        every = train(*FAST) if name in FAST else train(name)
        return {ranks: results[name] for ranks, results in every.items()}

    return of


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["offload_activations", "offload_weights", "both"])
def test_what_is_kept_in_host_memory_changes_no_bit(found: Found, ranks: int, name: str) -> None:
    plain, own = found("none")[ranks], found(name)[ranks]
    assert own["lines"] == plain["lines"] and own["lines"][0]["loss"] != own["lines"][-1]["loss"]
    assert own["weights"][0].keys() == plain["weights"][0].keys()
    assert all(torch.equal(value, plain["weights"][0][key]) for key, value in own["weights"][0].items())
    assert own["devices"] == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_layers_train_alike(found: Found, ranks: int) -> None:
    plain, own = found("none")[ranks], found("compile")[ranks]
    assert [line["loss"] for line in own["lines"]] == pytest.approx([line["loss"] for line in plain["lines"]], rel=1e-4)
    for key, value in own["weights"][0].items():
        torch.testing.assert_close(value, plain["weights"][0][key], rtol=1e-4, atol=1e-4)  # a step is 1e-2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_continues_bit_for_bit(found: Found, ranks: int, name: str) -> None:
    straight, again, _ = found(name)[ranks]["weights"]
    assert all(torch.equal(value, again[key]) for key, value in straight.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_one_rank_continues_on_two(found: Found, name: str) -> None:
    """Its moments are the same bit for bit. Then sums have another order, and numbers for rounding other places."""
    for own, expected in zip(found(name)[2]["restored"], found(name)[1]["saved"], strict=True):
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], value) and own[key].dtype == value.dtype for key, value in expected.items())
    straight, other = found(name)[1]["weights"][0], found(name)[2]["weights"][2]
    exact = OPTIONS[name][1] == "float32"
    for key, value in straight.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5 if exact else 3e-3)  # a step is 1e-2

"""Models that each rank reads in slices have the values of models loaded whole, on 1, 2 and 4 gloo ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sgpo_async.config.schema import Learner, Lora
from sgpo_async.learner import loading, optimiser, policy
from sgpo_async.learner.batch import from_shard
from sgpo_async.learner.lora import initial
from sgpo_async.learner.policy import Policy
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.model import slices
from sgpo_async.model.adapters import is_adapter
from sgpo_async.model.load import load_model
from sgpo_async.model.slices import Slices
from tests.reference import learner_cases as cases

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]  # on a busy machine the setup alone takes minutes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FOLDERS = [(tied, stored) for tied in (False, True) for stored in DTYPES]
RUN = cases.settings(row_tokens=20)


def model(tied: bool) -> PreTrainedModel:
    """A model of whose parameters none is divisible by four, and some have fewer rows."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=cases.VOCABULARY, hidden_size=6, intermediate_size=7, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def folder_of(root: Path, tied: bool, stored: str) -> str:
    return str(root / f"tied-{tied}-{stored}")


def worker(rank: int, root: Path, ranks: int) -> None:
    """Load every folder in each way; rank 0 writes what it found to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store-{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    found: dict[str, Any] = {}
    for tied, stored in FOLDERS:
        folder = folder_of(root, tied, stored)
        found[folder] = {"whole": gradient(whole(folder, mesh), rank)}
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(loading, "load_model")  # nothing is loaded whole
            patch.setattr(loading, "open_slices", counted)
            Counted.read = 0
            loaded = loading.load_policy(folder, RUN, mesh)
            assert Counted.read == sum(p.to_local().numel() for p in loaded.parameters())
            found[folder]["sliced"] = gradient(loaded, rank)
            patch.setattr(policy, "GROUP_BYTES", 0)
            grouped = replace(RUN, learner=Learner(precision="bfloat16", recompute=1))
            found[folder]["policy"] = values(loading.load_policy(folder, grouped, mesh))
            adapted = replace(RUN, learner=Learner(precision="float32", lora=Lora(rank=5)))
            found[folder]["adapters"] = values(loading.load_policy(folder, adapted, mesh))
            for dtype in DTYPES:
                run = replace(RUN, algorithm=replace(RUN.algorithm, teacher="frozen", teacher_dtype=dtype))
                found[folder][f"teacher {dtype}"] = values(loading.load_teacher(folder, run, mesh))
    if rank == 0:
        torch.save(found, root / f"found-{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Counted:
    """A slice of a file that counts the elements that are read, if they are a rank's rows."""

    read = 0

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getitem__(self, rows: slice) -> Tensor:
        found = self._part[rows]
        Counted.read += found.numel()
        return found


def counted(folder: str) -> Slices:
    found = slices.open_slices(folder)
    assert all(parameter.is_meta for parameter in found.model.parameters())
    return Slices(found.model, {name: Counted(part) for name, part in found.parameters.items()})


def whole(folder: str, mesh: DeviceMesh) -> Policy:
    return policy.shard(Policy(load_model(folder, device="cpu", dtype="float32")), mesh, precision="float32")


def values(loaded: Policy) -> dict[str, Any]:
    """Whole tensors, and the largest number of elements of each that one rank holds."""
    parameters = dict(loaded.model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, {name: p.to_local().numel() for name, p in parameters.items()})
    return {
        "parameters": {name: p.detach().full_tensor() for name, p in parameters.items()},
        "buffers": dict(loaded.model.named_buffers()),
        "with gradient": {p.requires_grad for p in parameters.values()},
        "held": {name: max(size[name] for size in sizes) for name in parameters},
        "tied": loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight,
    }


def gradient(loaded: Policy, rank: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one step on the rollouts of four problems, all of them on rank 0."""
    stepper = Stepper(RUN, loaded, optimiser.build(loaded, RUN.optim), Teacher(RUN.algorithm, None))
    shard = cases.shard_of(cases.groups() if rank == 0 else [], problems=4)
    loss = stepper.accumulate(from_shard(shard, RUN.algorithm)).reduce()["loss"]
    return loss, {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for tied, stored in FOLDERS:
        folder = folder_of(root, tied, stored)
        model(tied).to(DTYPES[stored]).save_pretrained(folder, max_shard_size=300)
        assert len(list(Path(folder).glob("*.safetensors"))) > 3
    return root


@pytest.fixture(scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def found(request: pytest.FixtureRequest, root: Path) -> tuple[int, dict[str, Any]]:
    mp.spawn(worker, args=(root, request.param), nprocs=request.param)
    return request.param, torch.load(root / f"found-{request.param}.pt")


@pytest.mark.parametrize(("tied", "stored"), FOLDERS)
def test_values_equal_those_of_the_whole_model(found: tuple[int, dict], root: Path, tied: bool, stored: str) -> None:
    ranks, folder = found[0], folder_of(root, tied, stored)
    expected = load_model(folder, device="cpu", dtype="float32")
    for way, dtype in {"policy": "float32", "teacher float32": "float32", "teacher bfloat16": "bfloat16"}.items():
        loaded = found[1][folder][way]
        assert list(loaded["parameters"]) == [name for name, _ in expected.named_parameters()]
        assert list(loaded["buffers"]) == [name for name, _ in expected.named_buffers()]
        for name, parameter in expected.named_parameters():
            tensor = loaded["parameters"][name]
            assert tensor.dtype == DTYPES[dtype]
            assert torch.equal(tensor, parameter.detach().to(DTYPES[dtype])), name
            assert loaded["held"][name] == -(-len(parameter) // ranks) * (parameter.numel() // len(parameter))
        for name, buffer in expected.named_buffers():
            assert torch.equal(loaded["buffers"][name], buffer), name
            assert loaded["buffers"][name].dtype == buffer.dtype
        assert loaded["tied"] == tied
        assert loaded["with gradient"] == {way == "policy"}


@pytest.mark.parametrize(("tied", "stored"), FOLDERS)
def test_loss_and_gradient_equal_those_of_the_whole_model(
    found: tuple[int, dict], root: Path, tied: bool, stored: str
) -> None:
    loaded = found[1][folder_of(root, tied, stored)]
    (loss, gradients), (expected_loss, expected) = loaded["sliced"], loaded["whole"]
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(gradients[name], tensor), name
    assert any(tensor.any() for tensor in expected.values())


@pytest.mark.parametrize(("tied", "stored"), FOLDERS)
def test_adapters_are_the_same_on_any_number_of_ranks(
    found: tuple[int, dict], root: Path, tied: bool, stored: str
) -> None:
    ranks, folder = found[0], folder_of(root, tied, stored)
    loaded, expected = found[1][folder]["adapters"], load_model(folder, device="cpu", dtype="float32")
    adapters = {name: tensor for name, tensor in loaded["parameters"].items() if is_adapter(name)}
    assert len(adapters) == 2 * 2 * 7
    for name, tensor in adapters.items():
        assert torch.equal(tensor, initial(name, tensor.shape, seed=RUN.seed))
        assert loaded["held"][name] == -(-len(tensor) // ranks) * (tensor.numel() // len(tensor))
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded["parameters"][name], parameter)
    assert loaded["with gradient"] == {True, False}

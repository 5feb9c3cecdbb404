"""Compiled layers on one rank: the same loss and gradient, few graphs for rows of any length, what they need."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from sgpo_async.algorithm import LogProbability, Part
from sgpo_async.config.schema import Learner, Run
from sgpo_async.errors import ConfigError
from sgpo_async.learner import compiling, loading, policy
from sgpo_async.learner.packing import Packed, Tokens, pack
from sgpo_async.learner.policy import Policy, check_model, recompute, shard
from sgpo_async.learner.process_group import join_alone
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")

GRAPHS = 4  # of a layer: before attention two, of the layer and within its attention module, and two after it


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


NO_COMPILER = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policy, "GROUP_BYTES", 0)  # one FSDP group per layer, as for large models
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def learner(backend: str | None, monkeypatch: pytest.MonkeyPatch, *, every: int = 0) -> Policy:
    own = Policy(cases.tiny_model(dtype=torch.float32, exact=False))
    if backend:
        monkeypatch.setattr(compiling, "BACKEND", backend)
        compiling.compile_layers(own)
    recompute(own, every)
    return shard(own, join_alone(), precision="float32")


def rows() -> list[Packed]:
    """Rows of other lengths, with other numbers of sequences; the last one computes a common prompt once."""
    rng = np.random.default_rng(0)

    def sequence(prompt: int, completion: int) -> Tokens:
        return Tokens(rng.integers(0, 13, prompt).astype(np.int32), rng.integers(0, 13, completion).astype(np.int32))

    sizes = ((5, 1), (9, 3), (20, 2), (7, 5))
    found = [pack([sequence(2, length + i) for i in range(count)]) for length, count in sizes]
    one = sequence(9, 4)
    shared = pack([one, Tokens(one.prompt, sequence(1, 6).completion)])
    assert shared.shared is not None
    return [*found, shared]


def gradient(own: Policy, row: Packed) -> tuple[float, Tensor]:
    """Loss and gradient of a row, after a forward pass without gradient, as that of a teacher."""
    with torch.no_grad():
        own.hidden(row)
    measure = LogProbability(torch.from_numpy(row.targets))
    loss, _ = own(row, [Part(measure, lambda log_pi, _: log_pi.sum())], 1.0)
    loss.backward()
    found = torch.cat([p.grad.full_tensor().flatten() for p in own.parameters()])
    own.zero_grad()
    return float(loss.detach()), found


@pytest.mark.parametrize(
    ("backend", "every"),
    [
        ("aot_eager", 0),
        pytest.param("aot_eager", 1, marks=pytest.mark.slow),
        pytest.param("inductor", 1, marks=[NO_COMPILER, pytest.mark.slow]),
    ],
)
def test_loss_and_gradient_are_equal_to_rounding_and_rows_of_any_length_share_graphs(
    backend: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = learner(None, monkeypatch), learner(backend, monkeypatch, every=every)
    for number, row in enumerate(rows()):
        (loss, expected), (other, found) = gradient(plain, row), gradient(compiled, row)
        assert other == pytest.approx(loss, rel=1e-5)
        assert (found - expected).norm() < 1e-5 * expected.norm()
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 2 * GRAPHS, f"with and without gradient, after {number + 1} rows"
    check_model(compiled)


def test_without_a_compiler_the_start_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiling, "get_cpp_compiler", missing)
    with pytest.raises(
        ConfigError, match=r"^learner.compile must be false on a machine without a C\+\+ compiler .*, got True$"
    ):
        loading.load_policy("nowhere", Run(learner=Learner(compile=True)), join_alone())


def test_a_gpu_needs_triton_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    compiling.require_compiler("cpu")
    with pytest.raises(ConfigError, match="and the package triton, got True$"):
        compiling.require_compiler("cuda")


def test_a_learner_on_a_gpu_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.require_c_compiler()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ConfigError, match="a learner on a GPU needs a C compiler for triton: apt install gcc python3-dev"
    ):
        compiling.require_c_compiler()
    monkeypatch.setenv("CC", "/opt/cc")
    compiling.require_c_compiler()

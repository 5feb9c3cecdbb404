"""The kernels for CUDA compute what torch's operations compute (in Triton's interpreter), and compile for GPUs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_kernels import CASES, DTYPES, block, losses, mixed_types, random_logits

from sgpo_async.algorithm import DIVERGENCES, linear

pytest.importorskip("triton", reason="Triton is not installed here")

# Of a slope, relative to it. The interpreter cuts the last bits off where a GPU rounds to the nearest bfloat16.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.interpreted_kernels", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert not done.returncode, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_value_aside_and_slope_equal_those_of_torch_in_float64(interpreted: dict[str, Any], index: int) -> None:
    case = CASES[index]
    value, aside, slope = interpreted["blocks"][index]
    expected = block(case, *(x.double() for x in random_logits(case)))
    assert (value.dtype, aside.dtype, slope.dtype) == (torch.float32, torch.float32, case.dtype)
    for own, other in zip((value, aside), expected[:2], strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)
    # The slopes of the reverse KL and of Jensen-Shannon are differences of numbers that are as large as the value.
    atol = 1e-5 * max(1.0, float(expected[0].max())) if case.measure in DIVERGENCES else 1e-5
    torch.testing.assert_close(slope.double(), expected[2], rtol=ROUNDING[case.dtype], atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_of_several_parts_equal_those_of_torch(
    interpreted: dict[str, Any], dtype: torch.dtype
) -> None:
    found, expected = interpreted["losses"][DTYPES.index(dtype)], losses(dtype)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for own, other in zip(found[:-2], expected[:-2], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    for own, other in zip(found[-2:], expected[-2:], strict=True):
        assert (own.double() - other.double()).norm() < ROUNDING[dtype] * other.double().norm()


def test_a_teacher_may_have_logits_of_another_type(interpreted: dict[str, Any]) -> None:
    for found, expected in zip(interpreted["mixed types"], mixed_types(torch.float64), strict=True):
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own.double(), other.double(), rtol=1e-5, atol=1e-5)


def test_a_nan_among_the_logits_makes_value_and_slope_of_its_row_nan(interpreted: dict[str, Any]) -> None:
    for value, _, slope in interpreted["not a number"]:
        assert value.isnan().tolist() == [False, True, False]
        assert slope.isnan().all(-1).tolist() == slope.isnan().any(-1).tolist() == [False, True, False]


def test_identical_teacher_and_student_give_exactly_0(interpreted: dict[str, Any]) -> None:
    for value, _, slope in interpreted["same distribution"]:
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(slope, torch.zeros_like(slope))


def test_logits_on_a_cpu_are_left_to_torchs_operations() -> None:
    assert linear._kernels(torch.zeros(2, 3)) is None


@pytest.mark.parametrize("capability", [80, 90, 100], ids=["A100", "H100", "B200"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_to_machine_code_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, capability: int
) -> None:
    """Triton needs no GPU for this. An odd vocabulary has no promise about the alignment of its rows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sgpo_async.algorithm import linear_triton as kernels

    types = dict.fromkeys(("logits", "teacher", "student"), f"*{dtype}")
    types |= {"targets": "*i64", "rows": "*fp32", "vocabulary": "i32", "scale": "fp32"}
    each = [(kernel, {}) for kernel in (kernels._log_probability_value, kernels._log_probability_slope)]
    for kind in DIVERGENCES:
        each += [(kernel, {"KIND": kind}) for kernel in (kernels._divergence_value, kernels._divergence_slope)]
    for kernel, chosen in each:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"BLOCK": kernels.BLOCK, **chosen})
        compiled = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": kernels.WARPS})
        assert compiled.asm["cubin"]
        writes_bfloat16 = dtype == "bf16" and "slope" in kernel.__name__
        assert ("cvt.rn.bf16" in compiled.asm["ptx"]) == writes_bfloat16  # rounds to nearest

"""AdamW whose two moments take 4 or about 2 bytes of each parameter, instead of the 8 of float32.

bfloat16   m and v rounded to bfloat16, v at random to one of its two neighbours
int8       one byte each for m / sqrt(v) and for log v, and two scales per block of 256 values of a row: 2.03 bytes

A step computes in float32, on as many rows at a time as keep its own memory small. Moments, and the scales of their
blocks, are sharded by rows as the parameter is, so a checkpoint can be read by any number of ranks.

Rounding at random keeps v right on average. With beta2 near 1 a step changes v by less than half the distance between
two neighbours, so rounding to the nearest would leave v where it is: beta2 = 0.999 changes it by at most 2^-10 of its
value while gradients fall, and neighbours in bfloat16 are at least 2^-8 apart. The random numbers depend on the step
alone: a resumed run draws the same, and ranks that hold the same shard, on several nodes, stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

# Values of a parameter that a step computes at a time. On a CPU its 4 MB stay in the cache; on a GPU kernels have to be
# large, and the step takes some hundred MB.
CHUNK, GPU_CHUNK = 2**20, 2**25
BLOCK = 256  # values of a row that share the scales of int8
OCTAVES = 32.0  # int8 distinguishes v down to 2^-32 of the largest v of the block; smaller ones are raised to that
SMALLEST = 1e-18  # of sqrt(v), whose square float32 still holds

Named = dict[str, Tensor]


class Form(Protocol):
    """How the moments of a matrix of parameters [R, C] are stored; every tensor has R rows."""

    def columns(self, width: int) -> dict[str, tuple[int, torch.dtype]]:
        """Names, columns and dtypes of the tensors that hold the moments of C = `width` columns; zeros are zeros."""
        ...

    def read(self, stored: Named) -> tuple[Tensor, Tensor]:
        """The two moments m and v, each float32 [R, C], as tensors of their own."""
        ...

    def write(self, stored: Named, m: Tensor, v: Tensor, noise: torch.Generator) -> None:
        """Store m and v, each float32 [R, C]."""
        ...


class Bfloat16:
    """Both moments in bfloat16."""

    def columns(self, width: int) -> dict[str, tuple[int, torch.dtype]]:
        """See `Form`."""
        return {"exp_avg": (width, torch.bfloat16), "exp_avg_sq": (width, torch.bfloat16)}

    def read(self, stored: Named) -> tuple[Tensor, Tensor]:
        """See `Form`."""
        return stored["exp_avg"].float(), stored["exp_avg_sq"].float()

    def write(self, stored: Named, m: Tensor, v: Tensor, noise: torch.Generator) -> None:
        """See `Form`."""
        stored["exp_avg"].copy_(m)
        # The upper 16 bits of a float32 are a bfloat16. The lower ones are the chance of the next larger one.
        lower = torch.randint(2**16, v.shape, dtype=torch.int32, device=v.device, generator=noise)
        upper = lower.add_(v.view(torch.int32)).bitwise_and_(-(2**16))
        stored["exp_avg_sq"].copy_(upper.view(torch.float32))


class Int8:
    """Each value in one byte, relative to its block of `BLOCK` values of a row.

    v is stored by its logarithm, so that small values next to large ones keep their precision; as they divide the step,
    an error there would not be bounded by the block's largest value. m is stored as m / sqrt(v), the step itself, whose
    error is then at most 1/254 of the largest step of the block.
    """

    def columns(self, width: int) -> dict[str, tuple[int, torch.dtype]]:
        """See `Form`."""
        blocks = -(-width // BLOCK)
        names = {"ratio": torch.int8, "square": torch.uint8}
        values = {name: (width, dtype) for name, dtype in names.items()}
        return values | {f"{name}_scale": (blocks, torch.float32) for name in names}

    def read(self, stored: Named) -> tuple[Tensor, Tensor]:
        """See `Form`."""
        width = stored["ratio"].shape[1]
        v = _square(_blocks(stored["square"].float()), stored["square_scale"])
        m = _blocks(stored["ratio"].float()) * stored["ratio_scale"][..., None] * _root(v)
        return m.flatten(1)[:, :width], v.flatten(1)[:, :width]

    def write(self, stored: Named, m: Tensor, v: Tensor, noise: torch.Generator) -> None:
        """See `Form`."""
        width, blocks = v.shape[1], _blocks(v)
        largest = blocks.amax(-1)
        below = blocks.div_(largest.clamp(min=SMALLEST**2)[..., None]).log2_().neg_().clamp_(0, OCTAVES)
        chance = torch.rand(below.shape, device=v.device, generator=noise)
        square = below.mul_(255 / OCTAVES).add_(chance).floor_().clamp_(max=255)
        ratio = _blocks(m) / _root(_square(square, largest))
        scale = ratio.abs().amax(-1) / 127
        ratio = ratio.div_(scale.clamp(min=SMALLEST)[..., None]).round_()
        stored["square_scale"].copy_(largest)
        stored["ratio_scale"].copy_(scale)
        stored["square"].copy_(square.flatten(1)[:, :width])
        stored["ratio"].copy_(ratio.flatten(1)[:, :width])


def _blocks(values: Tensor) -> Tensor:
    """Divide the rows of [R, C] into blocks, the last one filled up with 0: [R, blocks, BLOCK], a tensor of its own."""
    return functional.pad(values, (0, -values.shape[1] % BLOCK)).view(len(values), -1, BLOCK)


def _square(stored: Tensor, largest: Tensor) -> Tensor:
    """V of what is stored for it, float32 [R, blocks, BLOCK], and of the largest v of each block [R, blocks]."""
    return torch.exp2(stored * (-OCTAVES / 255)) * largest[..., None]


def _root(v: Tensor) -> Tensor:
    return v.sqrt().clamp_(min=SMALLEST)


FORMS: dict[str, Form] = {"bfloat16": Bfloat16(), "int8": Int8()}


class AdamW(torch.optim.Optimizer):
    """AdamW for parameters that are sharded by rows, with moments in a compact form.

    Vectors (norms, biases) keep their moments in bfloat16 in either form: a scale for each of their rows would take
    more than it saves.

    Args:
        groups: parameters, all of them DTensors, with their `weight_decay`.
        lr: the learning rate.
        betas: the decay of the two moments per step.
        form: of the moments of matrices.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        form: Literal["bfloat16", "int8"],
        eps: float = 1e-8,
    ) -> None:
        self._form = FORMS[form]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No communication."""
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            generators: dict[torch.device, torch.Generator] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    device = parameter.device
                    if device not in generators:
                        generators[device] = torch.Generator(device).manual_seed(group["step"])
                    self._update(parameter, group, generators[device])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this form as it is, where torch's own method would make float32 of every tensor."""
        saved = state_dict["param_groups"]
        numbers = [number for group in saved for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])
        for own, other in zip(self.param_groups, saved, strict=True):
            own.update({key: value for key, value in other.items() if key != "params"})

    def _update(self, parameter: DTensor, group: dict[str, Any], noise: torch.Generator) -> None:
        form = self._form if parameter.ndim >= 2 else FORMS["bfloat16"]
        state = self.state[parameter]
        if not state:
            columns = form.columns(math.prod(parameter.shape[1:]))
            state.update({name: _zeros(parameter, *column) for name, column in columns.items()})
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        whole = {name: _rows(value) for name, value in state.items()}
        for part in _parts({"parameter": _rows(parameter), "gradient": _rows(gradient)} | whole):
            _step(part.pop("parameter"), part.pop("gradient"), part, form, group, noise)


def _step(
    parameter: Tensor, gradient: Tensor, stored: Named, form: Form, group: dict[str, Any], noise: torch.Generator
) -> None:
    """Update some rows of a parameter [R, C] and what is stored of their moments."""
    (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
    gradient = gradient.float()
    m, v = form.read(stored)
    m.lerp_(gradient, 1 - beta1)
    v.lerp_(gradient.square(), 1 - beta2)
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    parameter.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    form.write(stored, m, v, noise)


def _zeros(parameter: DTensor, columns: int, dtype: torch.dtype) -> DTensor:
    """A matrix of `columns` columns with the rows of `parameter`, on the same ranks and device."""
    local = parameter.to_local()
    rows = torch.zeros(len(local), columns, dtype=dtype, device=local.device)
    shape, stride = torch.Size((len(parameter), columns)), (columns, 1)
    made = DTensor.from_local(rows, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
    moved = made.to(local.device)  # from_local has moved it to the device of the mesh
    assert isinstance(moved, DTensor)
    return moved


def _rows(tensor: DTensor) -> Tensor:
    """This rank's rows, as a matrix."""
    return tensor.to_local().view(-1, math.prod(tensor.shape[1:]))


def _parts(matrices: Named) -> Iterator[Named]:
    """Cut matrices with the same rows into parts of few rows, which share their memory."""
    rows, width = matrices["parameter"].shape
    count = max(1, (CHUNK if matrices["parameter"].device.type == "cpu" else GPU_CHUNK) // width)
    for start in range(0, rows, count):
        yield {name: matrix[start : start + count] for name, matrix in matrices.items()}

"""Replace a model's parameters by others of the same names and shapes, and prove that they arrived.

The travelling dtype may be narrower than the model's (bfloat16 weights in a float32 engine): the cast is then exact
both ways, and the digest is taken of the model's own parameters cast back. A cast that would round is refused, as
no digest could tell rounding from damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from sgpo_async.errors import WeightsError

Digest = Callable[[Iterable[tuple[str, torch.Tensor]]], str]


def check(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError unless `tensors` can replace the parameters of `model` (tied ones counted once)."""
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise WeightsError(
            f"weights of another model: {len(missing)} parameters missing ({_some(missing)}), "
            f"{len(extra)} unknown ({_some(extra)}); learner and engine need the same model.path"
        )
    for name, parameter in own.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise WeightsError(
                f"parameter {name}: shape {tuple(tensor.shape)} arrived, the engine has {tuple(parameter.shape)}"
            )
        if torch.promote_types(tensor.dtype, parameter.dtype) != parameter.dtype:
            raise WeightsError(
                f"parameter {name}: {tensor.dtype} arrived, which the engine's {parameter.dtype} cannot hold exactly; "
                f"use the same model.dtype on both sides"
            )


def replace(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], digest: Digest) -> str:
    """Copy `tensors` (checked) into `model`; returns the digest of what the model then holds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        return digest((name, p.detach().to(tensors[name].dtype)) for name, p in model.named_parameters())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

"""Replace a model's parameters by tensors of the same names and shapes, and verify the result by a digest.

The dtype of the received tensors may be narrower than the model's (bfloat16 weights in a float32 engine). Casting to
the wider dtype and back is then exact, so the digest is computed from the model's own parameters, cast back. A cast
that would round is rejected, because a digest could not distinguish rounding from damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from sgpo_async.errors import WeightsError

Digest = Callable[[Iterable[tuple[str, torch.Tensor]]], str]


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep the parameters of `model` in `dtype`; not its buffers, because positions are computed in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def check(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError unless `tensors` can replace the parameters of `model` (a tied parameter counts once)."""
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise WeightsError(
            f"the weights belong to another model: {len(missing)} parameters missing ({_some(missing)}), "
            f"{len(extra)} unknown ({_some(extra)}); learner and engine need the same model.path"
        )
    for name, parameter in own.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise WeightsError(
                f"parameter {name}: shape must be {tuple(parameter.shape)}, the engine's, got {tuple(tensor.shape)}; "
                f"learner and engine need the same model.path"
            )
        if torch.promote_types(tensor.dtype, parameter.dtype) != parameter.dtype:
            raise WeightsError(
                f"parameter {name}: the engine's {parameter.dtype} cannot hold the received {tensor.dtype} exactly; "
                f"use the same model.dtype for learner and engine"
            )


def replace(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], digest: Digest) -> str:
    """Copy `tensors`, which `check` has accepted, into `model`; return the digest of the model's new parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        return digest((name, p.detach().to(tensors[name].dtype)) for name, p in model.named_parameters())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

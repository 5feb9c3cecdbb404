"""Low-rank adapters in the policy: linear layers that add scale B A x, and train A and B alone.

A starts from the distribution that peft uses, B from 0, so the first policy is the model itself. The initial values
depend on the seed and on the name of the layer only, so every rank computes its own rows of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from xxhash import xxh3_64_intdigest

from sgpo_async.config.schema import Lora
from sgpo_async.errors import ConfigError
from sgpo_async.model.adapters import DOWN, is_adapter
from sgpo_async.model.parameters import cast


class Adapted(nn.Module):
    """A linear layer with an adapter. Its own parameters keep their names, and are not trained."""

    def __init__(self, layer: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        linear = partial(nn.Linear, bias=False, device=layer.weight.device, dtype=dtype)
        self.lora_A, self.lora_B = linear(layer.in_features, lora.rank), linear(lora.rank, layer.out_features)
        self.scale, self.enabled = lora.scale, True

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        y = functional.linear(x, self.weight, self.bias)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.enabled else y


def adapt(model: PreTrainedModel, layers: list[nn.Module], lora: Lora, *, dtype: torch.dtype) -> None:
    """Give the linear layers within `layers` adapters, in float32 or wider; freeze all other parameters, in `dtype`.

    Raises ConfigError if `lora.targets` names a layer that does not exist, or if there is none.
    """
    model.requires_grad_(False)
    cast(model, dtype)
    for parent, name, child in _chosen(layers, lora):
        setattr(parent, name, Adapted(child, lora))


def adapter_parameters(layers: list[nn.Module], lora: Lora) -> int:
    """How many parameters `adapt` would add. Raises ConfigError like it."""
    return sum(lora.rank * (child.in_features + child.out_features) for _, _, child in _chosen(layers, lora))


def _chosen(layers: list[nn.Module], lora: Lora) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that get adapters: parent, name and layer."""
    linear = [
        (parent, name, child)
        for layer in layers
        for parent in [*layer.modules()]
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    known = sorted({name for _, name, _ in linear})
    if unknown := [name for name in lora.targets if name not in known] or (not known):
        raise ConfigError(
            f"learner.lora.targets: must be names of the model's linear layers ({', '.join(known) or 'it has none'}), "
            f"got {unknown if known else lora.targets}"
        )
    return [(parent, name, child) for parent, name, child in linear if name in (lora.targets or known)]


def initial(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """The initial value of the adapter's parameter `name`: A as peft draws it, uniform in ±1/sqrt(inputs); B 0."""
    if not name.endswith(DOWN):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def initialise(model: nn.Module, *, seed: int) -> None:
    """Set the adapters of a model that is not sharded to their initial values; without memory they get none."""
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not parameter.is_meta:
            parameter.data.copy_(initial(name, parameter.shape, seed=seed))


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Compute the model itself, without its adapters, within the context."""
    adapted = [child for child in module.modules() if isinstance(child, Adapted)]
    for child in adapted:
        child.enabled = False
    try:
        yield
    finally:
        for child in adapted:
            child.enabled = True

"""Weights that arrive as adapters, and are added to the node's own copy of the model.

weight store ── adapters, verified ──▶ merge ──▶ whole weights, with a digest of their own ──▶ engine
model.path   ── tensors of the model ──┘
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from sgpo_async.engines.base import Weights
from sgpo_async.model.adapters import merge
from sgpo_async.model.load import load_model
from sgpo_async.model.parameters import Digest
from sgpo_async.model.slices import CannotSliceError, Slice, open_slices
from sgpo_async.weights.digest import digest

log = logging.getLogger(__name__)


class BaseModel(Mapping[str, torch.Tensor]):
    """The parameters of the model in `folder`, in `dtype` (its torch name), on the CPU.

    They are read from the files anew each time, so they take no memory; or, if the files have another form than the
    model, they are loaded once, and kept. The first access raises DataError if the model cannot be read.
    """

    def __init__(self, folder: str, dtype: str) -> None:
        self._folder, self._dtype = folder, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """The parameter of this name; the caller must not change it."""
        return self._parameters[name][:].detach().to(getattr(torch, self._dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @cached_property
    def _parameters(self) -> Mapping[str, torch.Tensor | Slice]:
        try:
            slices = open_slices(self._folder)
        except CannotSliceError as reason:
            log.info("model.path: the whole model of %s is kept in memory: %s", self._folder, reason)
            return dict(load_model(self._folder, device="cpu", dtype=self._dtype).named_parameters())
        return {name: slices.parameters[name] for name, _ in slices.model.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class AdapterWeights(Weights):
    """One version of adapters, for an engine that serves the model with them; `digest` and `read` are the adapters'."""

    base: BaseModel
    scale: float  # see `model.adapters`

    def copy(self) -> tuple[Mapping[str, torch.Tensor], str]:
        """See `Weights.copy`; raises WeightsError if the adapters are damaged or those of another model."""
        tensors = self.verified(digest)
        return tensors, digest(tensors.items())

    def verified(self, digest: Digest) -> Mapping[str, torch.Tensor]:
        """See `Weights.verified`; raises WeightsError also if the adapters are those of another model."""
        return dict(merge(self.base, self._verified(digest, "adapters"), self.scale))

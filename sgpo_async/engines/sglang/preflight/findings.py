"""The server under test, the learner's model as the reference, and the findings of checks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from sgpo_async.config.schema import Engine as EngineSettings
from sgpo_async.engines.base import Weights
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts
from sgpo_async.engines.sglang.weight_sync.transports import Transport
from sgpo_async.errors import CheckFailed, CheckWarning, SgpoError
from sgpo_async.model import parameters
from sgpo_async.model.folder import stored_parameters
from sgpo_async.model.load import load_model
from sgpo_async.weights.digest import name_of
from sgpo_async.weights.store_file import available_memory

Outcome = Literal["ok", "warning", "failed", "not run"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    outcome: Outcome
    found: str
    remedy: str = ""


def finding_of(check: str, error: SgpoError, *, remedy: str) -> Finding:
    """The finding of a check that raised `error`; `remedy` is used if the error has no remedy of its own."""
    if isinstance(error, CheckFailed):
        outcome: Outcome = "warning" if isinstance(error, CheckWarning) else "failed"
        return Finding(check, outcome, error.found, error.remedy)
    return Finding(check, "failed", str(error), remedy)


class Reference:
    """The learner's model: weights from a folder, rounded to `dtype`; forward passes in float32 on the CPU.

    It is loaded once, on first use, by any thread. `digest` is computed over (name, tensor), as an engine's.
    """

    def __init__(self, folder: str, *, dtype: str, digest: parameters.Digest) -> None:
        self._folder, self._dtype, self._digest = folder, getattr(torch, dtype), digest
        self._lock = threading.Lock()
        self._model: PreTrainedModel | None = None

    def model(self) -> PreTrainedModel:
        """The model. Raises DataError if it cannot be loaded, CheckFailed if the memory does not suffice."""
        with self._lock:
            if self._model is None:
                self._require_memory()
                model = load_model(self._folder, device="cpu", dtype="float32")
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(parameter.to(self._dtype))
                self._model = model
            return self._model

    def _require_memory(self) -> None:
        copy = 0 if self._dtype == torch.float32 else self._dtype.itemsize  # of `weights`
        needed = stored_parameters(self._folder) * (torch.float32.itemsize + copy)
        if needed > (available := available_memory()):
            sizes = f"take {needed / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are free"
            remedy = "free some memory, or check the servers from a machine with more"
            raise CheckFailed(f"the learner's model and its weights {sizes}", remedy)

    def weights(self, version: int, *, changed: str = "") -> Weights:
        """Its parameters as a weight version. The first element of the parameter `changed` is increased minimally."""
        tensors = {name: parameter.detach().to(self._dtype) for name, parameter in self.model().named_parameters()}
        if changed:
            tensors[changed] = tensors[changed].clone()
            first = tensors[changed].view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
        return Weights(version=version, digest=self._digest(tensors.items()), read=tensors.copy)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The server under test, and the model and settings that it must match."""

    server: Server
    model: ModelFacts
    engine: EngineSettings
    transports: Sequence[Transport]
    tokens: int = 0  # length of the longest completion
    truncated: bool = False  # whether rollouts are sampled with top-p or top-k
    reference: Reference | None = None  # for the checks that need the learner's model

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return name_of(self.model.dtype)

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return self.model.device

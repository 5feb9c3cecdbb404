"""What an actor asks of an inference engine, whichever it is.

An engine is driven by one thread through `submit` and `step`; between two steps the actor may load new weights.
An engine that lives elsewhere (servers) does its waiting inside `step`, within the time it is given, and its loading
in the background: `version` tells when a version is in service.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from sgpo_async.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample a continuation of `prompt` at `temperature`, from the full vocabulary unless `top_p` is below 1."""

    id: Hashable
    prompt: np.ndarray  # [L] int32
    max_new_tokens: int
    temperature: float
    seed: int  # the sample depends on this and the logits alone
    top_p: float = 1.0  # below 1: from the nucleus alone; for evaluation, never for training
    top_logprobs_num: int = 0  # how many of the likeliest tokens are told at each position


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of given `tokens` after `prompt` at `temperature` (Eq. 4)."""

    id: Hashable
    prompt: np.ndarray  # [L] int32
    tokens: np.ndarray  # [T] int32
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A finished continuation."""

    id: Hashable
    tokens: np.ndarray  # [T] int32, with the end token if it was sampled
    logprobs: np.ndarray  # [T] float32, of the distribution that was sampled from; SGLang's is that before top_p
    versions: np.ndarray  # [S] int32
    ends: np.ndarray  # [S] int32, exclusive
    finish: Literal["stop", "length"]
    top_tokens: np.ndarray | None = None  # [T * k] int32, the k likeliest at each position, the likeliest first
    top_logprobs: np.ndarray | None = None  # [T * k] float32, of the distribution before top_p


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Answer to `Score`."""

    id: Hashable
    logprobs: np.ndarray  # [T] float32
    version: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The end of a request of which only serving could show that it cannot be served; the engine goes on."""

    id: Hashable
    error: EngineError  # names the request


Result = Generated | Scored | Failed


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One whole version of the weights, where it can be had."""

    version: int
    digest: str  # of its tensors, see `sgpo_async.weights.digest`
    read: Callable[[], Mapping[str, torch.Tensor]]  # a whole copy on the CPU; raises Superseded if it is gone
    groups: Any = None  # where the learner can broadcast it: `sgpo_async.session.WeightGroups`


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How busy an engine is."""

    running: int  # sequences in slots
    waiting: int  # requests not yet admitted
    slots: int
    tokens: int  # generated since the start


class Engine(Protocol):
    """One inference engine."""

    @property
    def version(self) -> int | None:
        """The whole, verified version in service; None before the first load or after a failed one."""

    def submit(self, request: Generate | Score) -> None:
        """Queue a request. Raises EngineError if it can never be served (too long, token id out of range)."""

    def step(self, timeout_s: float) -> Sequence[Result]:
        """Do one unit of work, or wait up to `timeout_s` for a result; return what finished, or failed for good."""

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Forget these requests: no result of theirs comes from now on; unknown ids are ignored."""

    def load(self, weights: Weights) -> None:
        """Replace the weights between two tokens; running sequences continue under the new version.

        Raises WeightsError if names or shapes differ (weights untouched), or if the digest of the loaded weights is
        not the announced one (then `version` is None and nothing is served until a good load). An engine that loads
        in the background tells of failures by `news`.
        """

    def load_status(self) -> EngineLoad:
        """Counters of the moment."""

    def news(self) -> list[str]:
        """What a person should know, one line each, since the last call."""

    def reset(self) -> None:
        """Forget all requests, and the version: a new session may number other weights alike."""

    def close(self) -> None:
        """Free everything."""

"""The interface between an actor and an inference engine.

One thread drives an engine through `submit` and `step`; between two steps the actor may load new weights. An engine
that runs in other processes (servers) waits for results inside `step`, at most as long as its timeout, and loads
weights in the background: `version` names the version that it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from sgpo_async.errors import EngineError, WeightsError
from sgpo_async.model.canary import Canary
from sgpo_async.model.parameters import Digest
from sgpo_async.weights.broadcast_plan import BroadcastPlan


@dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """A completion or its beginning. The tokens form S spans; one weight version sampled all tokens of a span."""

    tokens: np.ndarray  # [T] int32, including the end token if it was sampled
    logprobs: np.ndarray  # [T] float32, under the distribution that was sampled from; see `Generate.report_kept`
    versions: np.ndarray  # [S] int32, weight version of each span
    digests: np.ndarray  # [S] int64, short digest of the weights that sampled each span, verified after their load
    ends: np.ndarray  # [S] int32, exclusive end of each span; the last is T
    top_tokens: np.ndarray | None = None  # [T * k] int32, the k likeliest at each position, the likeliest first
    top_logprobs: np.ndarray | None = None  # [T * k] float32, under the distribution over the whole vocabulary
    # If the request has `report_kept`: the other tokens that top_p and top_k kept, position by position, in any order.
    kept: np.ndarray | None = None  # [sum of kept_sizes] int32
    kept_sizes: np.ndarray | None = None  # [T] int32; 0 where only the sampled token was kept


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Request for a completion of `prompt`, sampled at `temperature` from the whole vocabulary or a part of it.

    The part consists of the likeliest tokens: as few as have a probability of `top_p` together, and at most `top_k`.

    With a `prefix`, which any engine may have sampled, the engine samples only what follows it, and the result is the
    whole completion. A prefix holds from 1 to `max_new_tokens` - 1 tokens, with their k likeliest tokens if the
    request asks for k, and does not end with an end token: the caller itself finishes what is complete.
    """

    id: Hashable
    prompt: np.ndarray  # [L] int32
    max_new_tokens: int  # of the whole completion, including the prefix
    temperature: float
    seed: int  # the seed and the logits determine the completion
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0: no limit
    # Report the tokens that were kept, and the log-probabilities renormalised over them. Training needs both. Without
    # it, SGLang reports the log-probabilities over the whole vocabulary.
    report_kept: bool = False
    top_logprobs_num: int = 0  # how many of the likeliest tokens to report at each position
    min_version: int = 0  # the oldest version that may sample; the engine serves it or a newer one at `submit`
    prefix: SampledTokens | None = None  # the beginning of the completion, which is already sampled


@dataclass(frozen=True, kw_only=True)
class Score:
    """Request for the log-probabilities of given `tokens` after `prompt` at `temperature` (Eq. 4)."""

    id: Hashable
    prompt: np.ndarray  # [L] int32
    tokens: np.ndarray  # [T] int32
    temperature: float


def score_of(canary: Canary) -> Score:
    """The request that scores the canary; its id meets no other request's."""
    return Score(id="canary", prompt=canary.prompt, tokens=canary.tokens, temperature=1.0)


@dataclass(frozen=True, kw_only=True)
class Generated(SampledTokens):
    """A finished completion."""

    id: Hashable
    finish: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The result of a `Score` request."""

    id: Hashable
    logprobs: np.ndarray  # [T] float32
    version: int


@dataclass(frozen=True, kw_only=True)
class ScoredCanary:
    """The log-probabilities of the canary under the weights that an engine, or one of its servers, serves."""

    engine: str  # URL of the server; "" if the engine has only one set of weights
    version: int
    digest: int  # short digest
    logprobs: np.ndarray  # [T] float32, at temperature 1


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A valid request that failed permanently while the engine served it. The engine continues to work."""

    id: Hashable
    error: EngineError  # its message names the request


Result = Generated | Scored | Failed


class BroadcastGroups(Protocol):
    """Process groups in which the weight sender broadcasts weights to servers; `sgpo_async.session.WeightGroups`.

    The methods return at once and may be called from any thread. Futures fail with SessionError, Superseded or
    WeightsError.
    """

    def open(self, group: str, *, backend: str, world_size: int) -> Future[tuple[str, int]]:
        """Open the rendezvous of a new group; the result is its host and port. `backend` is gloo or nccl."""

    def join(self, group: str) -> Future[None]:
        """Let the weight sender join as rank 0; done when all ranks have joined."""

    def plan(self, version: int) -> Future[BroadcastPlan]:
        """Get the list of broadcasts that a version consists of."""

    def broadcast(self, group: str, plan: BroadcastPlan) -> Future[None]:
        """Let the weight sender broadcast the version of `plan`; done when it has sent everything."""

    def compute(self, version: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Let the weight sender compute `function(tensors, *args, **kwargs)` on the tensors of a version."""

    def close(self, group: str) -> None:
        """Let the weight sender leave the group; calls in progress in the group fail. Unknown groups are ignored."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One complete version of the weights, and how to get it."""

    version: int
    digest: str  # of its tensors, see `sgpo_async.weights.digest`
    read: Callable[[], Mapping[str, torch.Tensor]]  # returns a complete CPU copy; raises Superseded if overwritten
    groups: BroadcastGroups | None = None  # None: the learner cannot broadcast this version

    def copy(self) -> tuple[Mapping[str, torch.Tensor], str]:
        """A complete CPU copy of the weights of the engine, and the digest that it must have.

        Raises Superseded if the version has been overwritten.
        """
        return self.read(), self.digest

    def verified(self, digest: Digest) -> Mapping[str, torch.Tensor]:
        """A complete CPU copy of the weights of the engine, made of what has the announced digest.

        Raises Superseded if the version has been overwritten, WeightsError if it is damaged.
        """
        return self._verified(digest, "weights")

    def _verified(self, digest: Digest, what: str) -> Mapping[str, torch.Tensor]:
        tensors = self.read()
        if (found := digest(tensors.items())) != self.digest:
            raise WeightsError(
                f"version {self.version}: the {what} have digest {found}, but {self.digest} was announced"
            )
        return tensors


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """The current load of an engine."""

    running: int  # sequences that occupy a slot
    waiting: int  # requests that are not yet admitted
    slots: int
    tokens: int  # tokens generated since the start


class Engine(Protocol):
    """One inference engine."""

    @property
    def reproducible(self) -> bool:
        """Whether a request that starts again, anywhere, samples the same tokens if the weights are the same."""

    @property
    def version(self) -> int | None:
        """The complete, verified version that is served; None before the first load and after a failed load."""

    @property
    def digest(self) -> int:
        """Short digest of the weights that are served, which were verified after they were loaded; 0 without any."""

    def watch(self, canary: Canary, *, every_s: float) -> None:
        """Score `canary` from now on: after each load, and every `every_s` seconds; every server of its own.

        Raises EngineError if the model cannot score it.
        """

    def canaries(self) -> list[ScoredCanary]:
        """The scores of the canary since the last call."""

    def submit(self, request: Generate | Score) -> None:
        """Queue a request. Raises EngineError if the request is invalid (too long, token id out of range)."""

    def step(self, timeout_s: float) -> Sequence[Result]:
        """Do one unit of work, or wait up to `timeout_s` for a result; return finished and failed requests."""

    def progress(self, ids: Iterable[Hashable]) -> dict[Hashable, SampledTokens]:
        """What these unfinished generations have sampled so far, running or waiting: prefixes for another engine.

        Tokens whose version is not known yet are left out, and so are generations without tokens, scores and unknown
        ids. Cheap enough for a call per second. The arrays are copies.
        """

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Cancel these requests: `step` returns no result for them from now on. Unknown ids are ignored."""

    def load(self, weights: Weights) -> None:
        """Replace the weights between two tokens; running sequences continue under the new version.

        Raises WeightsError if names or shapes differ (the weights stay as they are), or if the digest of the loaded
        weights is not the announced one (then `version` is None and the engine serves nothing until a load succeeds).
        An engine that loads in the background reports failures through `events`.
        """

    def load_status(self) -> EngineLoad:
        """The current load."""

    def events(self) -> list[str]:
        """Messages for the log since the last call, one line each."""

    def reset(self) -> None:
        """Drop all requests and the version, because a new session may use the same version number again."""

    def close(self) -> None:
        """Free all resources."""

"""Any transformers causal language model as an engine in the actor's own process, on CPU or one GPU.

    submit ──▶ waiting ──admit (prefill)──▶ running rows ──decode──▶ finished     step() does one round of this
                  ▲                              │
                  └────────── load ──────────────┘   new weights: each running sequence leaves its row, keeps its
                                                     tokens, and is prefilled again

A prefill covers all tokens of a sequence but the newest one. Decoding starts by feeding the newest token, so the same
code samples every token. Admission and scoring wait until the batch is large enough to be worth a forward pass of its
own, but at most `_MAX_WAIT_STEPS` steps. `step` never blocks: without work it returns at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Hashable, Iterable

import numpy as np
import torch
from transformers import PreTrainedModel

from sgpo_async.engines.base import (
    EngineLoad,
    Generate,
    Generated,
    SampledTokens,
    Score,
    Scored,
    ScoredCanary,
    Weights,
    score_of,
)
from sgpo_async.engines.decoder import Decoder
from sgpo_async.engines.sampling import distribution, likeliest, others_kept, sample
from sgpo_async.engines.sequences import Running, Sequence
from sgpo_async.engines.validation import validate
from sgpo_async.errors import EngineError, WeightsError
from sgpo_async.model import parameters
from sgpo_async.model.canary import Canary
from sgpo_async.model.load import end_tokens, load_model, longest, tokenizer_of
from sgpo_async.weights.short_digest import short_digest

_MAX_WAIT_STEPS = 8  # steps that a request waits for others to fill a batch


class EmbeddedEngine:
    """Engine that takes ownership of `model`. It serves requests after its first `load`.

    `digest` is computed over the loaded parameters (name, tensor). The token ids `end_ids` end a completion; None
    means the end tokens of the model's configuration. With `deterministic` the engine processes one sequence at a
    time, so results are bit-identical whatever else is queued. Raises EngineError if the model cannot be decoded with
    a key-value cache.
    """

    reproducible = True  # the seed, the position and the logits determine each token

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        digest: parameters.Digest,
        slots: int = 64,
        end_ids: Collection[int] | None = None,
        deterministic: bool = False,
    ) -> None:
        self.version: int | None = None
        self.digest = 0
        self._digest, self._slots = digest, 1 if deterministic else slots
        self._batch = max(1, self._slots // 4)  # this many rows or requests are worth a forward pass of their own
        self._deterministic = deterministic
        self._decoder = Decoder(model, self._slots)
        self._longest = longest(model)
        self._end_ids = frozenset(end_tokens(model) if end_ids is None else end_ids)
        self._ends = np.zeros(self._decoder.vocabulary, bool)
        self._ends[[i for i in self._end_ids if i < self._decoder.vocabulary]] = True
        self._running = Running(self._slots, self._decoder.move)
        self._waiting: deque[Sequence] = deque()
        self._scores: list[Score] = []
        self._admission_waited = self._scoring_waited = 0  # steps
        self._tokens = 0
        self._canary: Score | None = None
        self._canary_every_s = self._canary_due = 0.0
        self._canaries: list[ScoredCanary] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        digest: parameters.Digest,
        slots: int = 64,
        device: str = "auto",
        dtype: str = "float32",
        deterministic: bool = False,
    ) -> EmbeddedEngine:
        """Engine of the model at `path`; see `model.load.load_model` for arguments and errors."""
        model = load_model(path, device=device, dtype=dtype)
        ends = end_tokens(model, tokenizer_of(path))
        return cls(model, digest=digest, slots=slots, end_ids=ends, deterministic=deterministic)

    def submit(self, request: Generate | Score) -> None:
        """Queue a request. Raises EngineError if it is invalid, or while no verified weights are loaded."""
        if self.version is None:
            raise EngineError(f"request {request.id}: the engine has no verified weights; load a version first")
        self._validate(request)
        if isinstance(request, Score):
            self._scores.append(request)
        else:
            self._waiting.append(Sequence.of(request))

    def watch(self, canary: Canary, *, every_s: float) -> None:
        """Score `canary` after each load and every `every_s` seconds; see `Engine.watch`."""
        score = score_of(canary)
        self._validate(score)
        self._canary, self._canary_every_s, self._canary_due = score, every_s, 0.0

    def canaries(self) -> list[ScoredCanary]:
        """The scores of the canary since the last call."""
        canaries, self._canaries = self._canaries, []
        return canaries

    @torch.inference_mode()
    def step(self, timeout_s: float) -> list[Generated | Scored]:  # noqa: ARG002 (nothing to wait for in process)
        """Score and admit requests that are due, then decode one token of each running sequence.

        Returns finished requests. Raises EngineError if the weights give NaN logits; `version` is then None.
        """
        if self.version is None:
            return []
        if self._canary and time.monotonic() >= self._canary_due:
            self._score_canary(self.version, self._canary)
        return [*self._score(self.version), *self._admit_and_decode()]

    def progress(self, ids: Iterable[Hashable]) -> dict[Hashable, SampledTokens]:
        """What these unfinished generations have sampled so far; see `Engine.progress`."""
        wanted = set(ids)
        for row, sequence in enumerate(self._running.sequences):
            if sequence.request.id in wanted:
                self._running.update(row)
                self._close_span(sequence)
        sequences = (*self._running.sequences, *self._waiting)
        return {s.request.id: s.sampled() for s in sequences if s.request.id in wanted and s.generated}

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Cancel these requests and free their slots; unknown ids are ignored."""
        cancelled = set(ids)
        self._waiting = deque(s for s in self._waiting if s.request.id not in cancelled)
        self._scores = [s for s in self._scores if s.id not in cancelled]
        rows = [row for row, s in enumerate(self._running.sequences) if s.request.id in cancelled]
        with torch.inference_mode():
            self._running.remove(np.array(rows, np.int64))

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        """Replace the weights between two tokens; see `Engine.load` for the errors.

        Running sequences keep their tokens. They are prefilled again under the new weights, before waiting requests.
        """
        tensors, announced = weights.copy()
        parameters.check(self._decoder.model, tensors)
        self._withdraw()
        loaded = parameters.replace(self._decoder.model, tensors, self._digest)
        if loaded != announced:
            raise WeightsError(
                f"version {weights.version}: the loaded weights have digest {loaded}, but {announced} was "
                f"announced; the engine serves nothing until a load succeeds"
            )
        # `loaded` is made of what has this digest: `copy` has compared it, or it is the same one.
        self.version, self.digest = weights.version, short_digest(weights.digest)
        self._canary_due = 0.0

    def load_status(self) -> EngineLoad:
        """The current load."""
        waiting = len(self._waiting) + len(self._scores)
        return EngineLoad(running=len(self._running), waiting=waiting, slots=self._slots, tokens=self._tokens)

    def events(self) -> list[str]:
        """Always empty: this engine raises its errors."""
        return []

    def close(self) -> None:
        """Drop all requests and the version; the engine serves nothing until a load."""
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Drop all requests and the version; the engine serves nothing until a load."""
        self._withdraw()
        self._waiting.clear()
        self._scores.clear()
        self._canaries.clear()

    def _admit_and_decode(self) -> list[Generated]:
        free = self._slots - len(self._running)
        self._admission_waited += bool(self._waiting and free)
        if self._due(min(free, len(self._waiting)), self._admission_waited):
            self._admit(free)
        return self._decode() if self._running.sequences else []

    def _due(self, ready: int, waited: int) -> bool:
        """Whether a batch of `ready` requests that has waited `waited` steps gets its forward pass now."""
        return ready >= self._batch or waited >= _MAX_WAIT_STEPS or not self._running.sequences

    def _admit(self, free: int) -> None:
        self._admission_waited = 0
        first = len(self._running)
        admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        self._decoder.prefill(first, [s.ids[:-1] for s in admitted])
        for sequence in admitted:
            self._running.append(sequence)

    def _decode(self) -> list[Generated]:
        running, tensor = self._running, self._decoder.tensor
        logits = self._decoder.decode(running.newest(), running.positions())
        candidates = distribution(logits, tensor(running.temperatures()), running.top_p(), running.top_k())
        sampled, chosen = sample(candidates, tensor(running.uniforms()))
        tokens, logprobs = sampled.cpu().numpy(), chosen.cpu().numpy()
        self._reject_nan(logprobs)
        self._record_likeliest(logits)
        self._record_kept(candidates, sampled)
        stopped = self._ends[tokens]
        done = np.flatnonzero(running.extend(tokens, logprobs) | stopped)
        self._tokens += tokens.size
        if not done.size:
            return []
        finished = running.remove(done)
        for sequence in finished:
            self._close_span(sequence)
        return [s.result(stopped=bool(stop)) for s, stop in zip(finished, stopped[done], strict=True)]

    def _record_likeliest(self, logits: torch.Tensor) -> None:
        """Record the likeliest tokens of the rows whose requests ask for them."""
        running, tensor = self._running, self._decoder.tensor
        rows = np.flatnonzero(running.top_logprobs_num())
        if rows.size:
            k = int(running.top_logprobs_num().max())
            tokens, logprobs = likeliest(logits[tensor(rows)], tensor(running.temperatures()[rows]), k)
            running.record_likeliest(rows, tokens.cpu().numpy(), logprobs.cpu().numpy())

    def _record_kept(self, candidates: torch.Tensor, sampled: torch.Tensor) -> None:
        """Record the other tokens that could have been sampled, of the rows whose requests ask for them."""
        asking = np.flatnonzero(self._running.report_kept())
        if asking.size:
            rows = self._decoder.tensor(asking)
            for row, ids in zip(asking.tolist(), others_kept(candidates[rows], sampled[rows]), strict=True):
                self._running.sequences[row].kept.append(ids)

    def _score(self, version: int) -> list[Scored]:
        self._scoring_waited += bool(self._scores)
        if not self._scores or not self._due(len(self._scores), self._scoring_waited):
            return []
        self._scoring_waited = 0
        scores, self._scores = self._scores, []
        lengths = [s.prompt.size + s.tokens.size - 1 for s in scores]
        parts = self._decoder.scoring_batches(lengths)
        if self._deterministic:
            parts = [(i, i + 1) for i in range(len(scores))]
        return [result for start, stop in parts for result in self._score_batch(version, scores[start:stop])]

    def _score_canary(self, version: int, canary: Score) -> None:
        (scored,) = self._score_batch(version, [canary])
        self._canaries.append(ScoredCanary(engine="", version=version, digest=self.digest, logprobs=scored.logprobs))
        self._canary_due = time.monotonic() + self._canary_every_s

    def _score_batch(self, version: int, scores: list[Score]) -> list[Scored]:
        ids = [np.concatenate([s.prompt, s.tokens[:-1]]) for s in scores]
        logits = self._decoder.logits(ids, first=min(s.prompt.size for s in scores) - 1)
        missing = max(row.size for row in ids) - logits.shape[1]
        results = []
        for row, score in enumerate(scores):
            start = score.prompt.size - 1 - missing
            steps = logits[row, start : start + score.tokens.size]
            tokens = self._decoder.tensor(score.tokens.astype(np.int64))
            chosen = self._decoder.logprobs(steps, tokens, score.temperature).cpu().numpy()
            self._reject_nan(chosen)
            results.append(Scored(id=score.id, logprobs=chosen, version=version))
        return results

    def _reject_nan(self, logprobs: np.ndarray) -> None:
        """Raise EngineError and serve the version no longer if a log-probability is NaN."""
        if np.isnan(logprobs).any():
            version = self.version
            self._withdraw()
            raise EngineError(f"the weights of version {version} give NaN logits; publish a version without NaN")

    def _withdraw(self) -> None:
        """Set `version` to None; running sequences return to the head of the queue and keep their tokens."""
        sequences = self._running.remove(np.arange(len(self._running)))
        for sequence in sequences:
            self._close_span(sequence)
        self._waiting.extendleft(reversed(sequences))
        self._decoder.cache.forget()
        self.version, self.digest = None, 0

    def _close_span(self, sequence: Sequence) -> None:
        assert self.version is not None, "a sequence runs only while there is a version"
        sequence.close_span(self.version, self.digest)

    def _validate(self, request: Generate | Score) -> None:
        validate(request, longest=self._longest, vocabulary=self._decoder.vocabulary, ends=self._end_ids)

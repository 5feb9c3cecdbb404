"""A scripted engine, and leases and results for it."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from sgpo_async.engines.base import EngineLoad, Generated, Scored, ScoredCanary
from sgpo_async.errors import EngineError
from sgpo_async.tasks.cues_domain import draw_exercise
from sgpo_async.wire.records import Lease

TOKENIZER = SimpleNamespace(
    decode=lambda tokens, **_: "".join(chr(t) for t in tokens),
    encode=lambda text, **_: [ord(c) for c in text],
    all_special_ids=[],
    added_tokens_decoder={},
    vocab_size=128,
    unk_token_id=None,
)


_EXERCISE = draw_exercise(random.Random(0))
ANSWER, RIGHT = _EXERCISE.answer_text(_EXERCISE.true_techniques), _EXERCISE.solution_text(_EXERCISE.true_techniques)


class ScriptedEngine:
    """Records submitted requests and cancelled ids; `step` returns `answers` once."""

    reproducible = True

    def __init__(self) -> None:
        self.version: int | None = 0
        self.digest = 0
        self.watched: list[Any] = []
        self.scored: list[ScoredCanary] = []  # `canaries` returns them once
        self.submitted: list[Any] = []
        self.cancelled: list[Any] = []
        self.answers: list[Any] = []
        self.refuses: Any = None  # id of the request that `submit` refuses

    def watch(self, canary: Any, *, every_s: float) -> None:
        self.watched.append((canary, every_s))

    def canaries(self) -> list[ScoredCanary]:
        scored, self.scored = self.scored, []
        return scored

    def submit(self, request: Any) -> None:
        if request.id == self.refuses:
            raise EngineError(f"request {request.id}: too long")
        self.submitted.append(request)

    def cancel(self, ids: Any) -> None:
        self.cancelled += ids

    def step(self, timeout_s: float) -> list[Any]:
        answers, self.answers = self.answers, []
        return answers

    def progress(self, ids: Any) -> dict[Any, Any]:
        return {}

    def load_status(self) -> EngineLoad:
        return EngineLoad(running=0, waiting=0, slots=8, tokens=0)

    def reset(self) -> None:
        pass


def lease(task: int, *, autonomous: int = 2, guided: int = 0, purpose: Any = "train") -> Lease:
    """A task of the built-in domain; `RIGHT` is a correct completion."""
    return Lease(
        task=task, attempt=0, purpose=purpose, problem="a problem", answer=ANSWER, verifier="cues", strategy="add",
        autonomous=autonomous, guided=guided, min_version=0, seed=0, temperature=1.0, top_p=1.0, max_new_tokens=4,
        unguided_scores=True,
    )  # fmt: skip


def generated(key: tuple[int, int, int], text: str = "no") -> Generated:
    """A completion with this text, one token per character."""
    tokens = np.array([ord(c) for c in text], np.int32)
    ends = np.array([tokens.size], np.int32)
    return Generated(
        id=key,
        tokens=tokens,
        logprobs=-np.ones(tokens.size, np.float32),
        versions=0 * ends,
        digests=np.zeros(len(ends), np.int64),
        ends=ends,
        finish="stop",
    )


def scored(key: tuple[int, int, int], *logprobs: float) -> Scored:
    return Scored(id=key, logprobs=np.array(logprobs, np.float32), version=0)

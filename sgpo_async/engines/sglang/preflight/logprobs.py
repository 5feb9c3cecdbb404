"""What a server's log-probabilities mean: of sampled tokens log softmax(z / T), of given ones log softmax(z).

`consistent` needs no model: two tokens' logits differ by (log p_T - log p_T') T at every temperature T, so a
continuation generated at T, then scored, tells which temperature its log-probabilities are of. `teacher_forced`
compares with the learner's model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sgpo_async.engines.base import Generate, Score, Scored
from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.errors import CheckFailed

TEMPERATURES = (1.0, 0.7)
PROMPT_TOKENS = 6
REMEDY = (
    "look for what changes logits or log-probabilities: SGLANG_RETURN_ORIGINAL_LOGPROB in its environment, another "
    "model, a quantised cache"
)


@dataclass(frozen=True)
class Bound:
    """How far log-probabilities may be apart: on average, and the worst."""

    mean: float
    worst: float


# Measured on CPU servers with models of up to 61 M parameters. float32 differs by the order of sums alone, by at most
# 4e-5. bfloat16 rounds logits to 3 digits: single tokens scatter by up to 0.4, most where p is small; the mean was at
# most 0.07. A temperature of 0.7 that is ignored moves two tokens whose logits differ by d by 0.3 d.
BOUNDS = {"float32": Bound(1e-4, 1e-4), "bfloat16": Bound(0.15, 1.0)}


async def consistent(subject: Subject, told: Json) -> str:  # noqa: ARG001
    """Generated and then scored, at both temperatures."""
    found = []
    for temperature in TEMPERATURES:
        pairs = await asyncio.gather(*(_twice(subject, prompt, temperature) for prompt in _prompts(subject, 4)))
        errors = np.concatenate([_differences(*pair, temperature) for pair in pairs])
        found.append(_judge(errors, subject.dtype, f"T = {temperature:g}"))
    return "; ".join(found)


async def teacher_forced(subject: Subject, told: Json) -> str:  # noqa: ARG001
    """Sampled at both temperatures, and scored at 1, against the learner's model. The server holds its weights."""
    assert subject.reference is not None
    model = await asyncio.to_thread(subject.reference.model)
    found = []
    for temperature in TEMPERATURES:
        partials = await asyncio.gather(*(_sampled(subject, prompt, temperature) for prompt in _prompts(subject, 8)))
        errors = [await asyncio.to_thread(_errors, model, partial) for partial in partials]
        found.append(_judge(np.concatenate(errors), subject.dtype, f"T = {temperature:g}"))
    scored = await asyncio.gather(*(_scored(subject, partial) for partial in partials))
    errors = [
        result.logprobs - await asyncio.to_thread(_expected, model, partial, 1.0)
        for partial, result in zip(partials, scored, strict=True)
    ]
    return "; ".join([*found, _judge(np.concatenate(errors), subject.dtype, "given tokens")])


def _prompts(subject: Subject, count: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(0, subject.model.vocabulary, (count, PROMPT_TOKENS))
    return [list(map(int, prompt)) for prompt in ids]


def _new_tokens(subject: Subject) -> int:
    """Few; the shortest models have little room beside what SGLang reserves."""
    return max(1, min(12, subject.model.longest - PROMPT_TOKENS - 8))


def _judge(errors: np.ndarray, dtype: str, what: str) -> str:
    """Raise CheckFailed beyond the bound."""
    bound, mean, worst = BOUNDS[dtype], float(np.abs(errors).mean()), float(np.abs(errors).max())
    if not (mean <= bound.mean and worst <= bound.worst):  # also where they are not numbers
        raise CheckFailed(
            f"{what}: log-probabilities are off by {mean:.2g} on average, {worst:.2g} at most; {dtype} may be off by "
            f"{bound.mean:g} and {bound.worst:g}",
            REMEDY,
        )
    return f"{what}: {mean:.0e}, at most {worst:.0e}"


async def _twice(subject: Subject, prompt: Sequence[int], temperature: float) -> tuple[Json, Json]:
    """What the server says of a continuation when it generates it, and when it scores it."""
    sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "ignore_eos": True}
    more = {"return_logprob": True, "top_logprobs_num": 2}
    body: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": sampling, **more}
    timeout_s = subject.engine.sglang.phase_timeout_s
    generated = await subject.server.api.post(
        "/generate",
        body | {"sampling_params": sampling | {"max_new_tokens": _new_tokens(subject)}},
        timeout_s=timeout_s,
    )
    meta = generated["meta_info"]
    if lacking := [key for key in ("output_top_logprobs", "weight_versions", "finish_reason") if key not in meta]:
        raise CheckFailed(f"its answers lack {', '.join(lacking)}", "install the SGLang version that is tested")
    ids = [*prompt, *(token for _, token, _ in meta["output_token_logprobs"])]
    again = {
        "input_ids": ids,
        "logprob_start_len": len(prompt) - 1,
        "sampling_params": sampling | {"max_new_tokens": 0},
    }
    scored = await subject.server.api.post("/generate", body | again, timeout_s=timeout_s)
    return meta, scored["meta_info"]


def _differences(generated: Json, scored: Json, temperature: float) -> np.ndarray:
    """What must be zero: differences of two tokens' log-probabilities, times T, less those at T = 1."""
    errors: list[float] = []
    positions = zip(
        generated["output_token_logprobs"],
        generated["output_top_logprobs"],
        scored["input_token_logprobs"][1:],
        scored["input_top_logprobs"][1:],
        strict=True,
    )
    for (logp, token, _), tops, (given, _, _), given_tops in positions:
        at_t = {token: logp} | {top: value for value, top, _ in tops}
        at_1 = {token: given} | {top: value for value, top, _ in given_tops}
        best, *others = sorted(at_t.keys() & at_1.keys(), key=lambda id: -at_1[id])
        errors += [(at_t[best] - at_t[id]) * temperature - (at_1[best] - at_1[id]) for id in others]
        if temperature == 1.0:
            errors.append(logp - given)
    return np.array(errors)


async def _sampled(subject: Subject, prompt: Sequence[int], temperature: float) -> Partial:
    """A continuation by the road of rollouts."""
    request = Generate(
        id=tuple(prompt),
        prompt=np.array(prompt, np.int32),
        max_new_tokens=_new_tokens(subject),
        temperature=temperature,
        seed=0,
    )
    partial = Partial(request)
    await subject.server.extend(partial, subject.server.next_rid(), _version(subject))
    if not partial.tokens:
        raise CheckFailed("a generation brought no token", "look at the server's log")
    return partial


async def _scored(subject: Subject, partial: Partial) -> Scored:
    tokens = np.array(partial.tokens, np.int32)
    score = Score(id=partial.request.id, prompt=partial.request.prompt, tokens=tokens, temperature=1.0)
    scored = await subject.server.score(score, subject.server.next_rid(), _version(subject))
    if scored is None:
        raise CheckFailed("somebody aborted a request", "end whatever else uses the server")
    return scored


def _version(subject: Subject) -> int:
    assert subject.server.version is not None, "weights come first"
    return subject.server.version


def _errors(model: PreTrainedModel, partial: Partial) -> np.ndarray:
    return np.array(partial.logprobs) - _expected(model, partial, partial.request.temperature)


@torch.no_grad()
def _expected(model: PreTrainedModel, partial: Partial, temperature: float) -> np.ndarray:
    """log softmax(z / T) of the partial's tokens [T] under `model`."""
    ids = torch.tensor([partial.input_ids()])
    start = partial.request.prompt.size
    logits = model(ids[:, :-1], use_cache=False).logits[0, start - 1 :].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, ids[0, start:, None])[:, 0].numpy()

"""Checks a server's log-probabilities: log softmax(z / T) of sampled tokens, log softmax(z) of given tokens.

`consistent` needs no model. The logits of two tokens a, b differ by T (log p(a) - log p(b)) at every temperature T, so
generating a completion at T and then scoring it shows the temperature of its log-probabilities. `kept_tokens` needs
none either: it compares truncated sampling with the server's own likeliest tokens. `teacher_forced` compares with the
learner's model.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sgpo_async.engines.base import Generate, Score, Scored
from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.preflight.settings import TESTED
from sgpo_async.engines.sglang.processes.api import Json
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.errors import CheckFailed

TEMPERATURES = (1.0, 0.7)
PROMPT_TOKENS = 6
TOP_P, TOP_K = 0.8, 8  # of the check of truncated sampling
LISTED = (
    4 * TOP_K
)  # likeliest tokens that it asks for: with bfloat16 logits, many may be as likely as the last one kept
TIE = 1e-5  # relative difference of probabilities that are equal
SLACK = 1e-3  # of a sum of probabilities in the server's precision
SAMPLES = 5  # tries for a completion with at least one token
REMEDY = (
    "check what changes logits or log-probabilities: SGLANG_RETURN_ORIGINAL_LOGPROB in its environment, another "
    "model, a quantised cache"
)


@dataclass(frozen=True)
class Bound:
    """The largest allowed mean and maximum of absolute log-probability differences, in nats."""

    mean: float
    worst: float


# Measured on CPU servers with models of up to 61 M parameters. In float32 only the order of sums differs: by at most
# 4e-5. bfloat16 rounds logits to 3 digits: single tokens differed by up to 0.4, mostly where p is small; the mean was
# at most 0.07. For comparison: ignoring a temperature of 0.7 changes tokens whose logits differ by d by 0.3 d.
BOUNDS = {"float32": Bound(1e-4, 1e-4), "bfloat16": Bound(0.15, 1.0)}


async def consistent(subject: Subject, server_info: Json) -> str:  # noqa: ARG001
    """Check completions that are generated and then scored, at both temperatures."""
    found = []
    for temperature in TEMPERATURES:
        pairs = await asyncio.gather(
            *(_generated_and_scored(subject, prompt, temperature) for prompt in _prompts(subject, 4))
        )
        errors = np.concatenate([_differences(*pair, temperature) for pair in pairs])
        found.append(_judge(errors, subject.dtype, f"T = {temperature:g}"))
    return "; ".join(found)


async def kept_tokens(subject: Subject, server_info: Json) -> str:  # noqa: ARG001
    """Check that truncated completions report the kept tokens, and log-probabilities renormalised over them."""
    if not subject.truncated:
        return "not needed: rollouts are sampled from the whole vocabulary"
    metas = await asyncio.gather(*(_truncated(subject, prompt) for prompt in _prompts(subject, 4)))
    errors = np.concatenate([_kept_errors(meta) for meta in metas])
    return _judge(errors, subject.dtype, f"top-p {TOP_P}, top-k {TOP_K}")


async def teacher_forced(subject: Subject, server_info: Json) -> str:  # noqa: ARG001
    """Compare completions sampled at both temperatures, and scores at temperature 1, with the learner's model.

    The server must have the weights of `subject.reference`.
    """
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
    """A small number: models with few positions have little room besides the ones that SGLang reserves."""
    return max(1, min(12, subject.model.longest - PROMPT_TOKENS - 8))


def _judge(errors: np.ndarray, dtype: str, what: str) -> str:
    """Raise CheckFailed if `errors` exceed the bound of `dtype`; returns a summary."""
    bound, mean, worst = BOUNDS[dtype], float(np.abs(errors).mean()), float(np.abs(errors).max())
    if not (mean <= bound.mean and worst <= bound.worst):  # true for NaN as well
        raise CheckFailed(
            f"{what}: log-probabilities are off by {mean:.2g} on average, {worst:.2g} at most; the bounds for {dtype} "
            f"are {bound.mean:g} and {bound.worst:g}",
            REMEDY,
        )
    return f"{what}: {mean:.0e}, at most {worst:.0e}"


async def _generated_and_scored(subject: Subject, prompt: Sequence[int], temperature: float) -> tuple[Json, Json]:
    """The server's meta information of a completion when it generates it, and when it scores it."""
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
        raise CheckFailed(f"its answers lack {', '.join(lacking)}", f"install sglang=={TESTED} in its environment")
    ids = [*prompt, *(token for _, token, _ in meta["output_token_logprobs"])]
    again = {
        "input_ids": ids,
        "logprob_start_len": len(prompt) - 1,
        "sampling_params": sampling | {"max_new_tokens": 0},
    }
    scored = await subject.server.api.post("/generate", body | again, timeout_s=timeout_s)
    return meta, scored["meta_info"]


async def _truncated(subject: Subject, prompt: Sequence[int]) -> Json:
    """The server's meta information of a truncated completion."""
    sampling = {"temperature": 1.0, "top_p": TOP_P, "top_k": TOP_K, "min_p": 0.0, "ignore_eos": True}
    body = {
        "input_ids": list(prompt),
        "sampling_params": sampling | {"max_new_tokens": _new_tokens(subject)},
        "return_logprob": True,
        "top_logprobs_num": min(LISTED, subject.model.vocabulary - 1),
        "return_sampling_mask": True,
    }
    answer = await subject.server.api.post("/generate", body, timeout_s=subject.engine.sglang.phase_timeout_s)
    meta: Json = answer["meta_info"]
    if "output_token_sampling_mask" not in meta:
        raise CheckFailed(
            "its answers do not say which tokens top-p and top-k kept",
            f"install sglang=={TESTED} in its environment, or set rollout.top_p=1 and rollout.top_k=0",
        )
    return meta


def _kept_errors(meta: Json) -> np.ndarray:
    """Errors [T] that must be zero: the log of the kept tokens' probability, from the sampled token and from all.

    Raises CheckFailed if the kept tokens cannot be those of TOP_P and TOP_K. Of equally likely tokens, samplers keep
    all or some, so a kept token beyond the listed ones counts as equally likely as the last of them.
    """
    errors = []
    for (logp, token, _), tops, kept, renormalised in zip(
        meta["output_token_logprobs"],
        meta["output_top_logprobs"],
        meta["output_token_sampling_mask"],
        meta["output_token_sampling_logprobs"],
        strict=True,
    ):
        probabilities = {id: math.exp(value) for value, id, _ in tops}
        own = [probabilities.get(id, min(probabilities.values())) for id in kept]
        mass = sum(own)
        likelier = [p for p in own if p > min(own) * (1 + TIE)]
        enough = mass > TOP_P - SLACK or len(kept) >= TOP_K
        if token not in kept or not enough or sum(likelier) > TOP_P + SLACK or len(likelier) >= TOP_K:
            raise CheckFailed(
                f"top-p {TOP_P}, top-k {TOP_K}: kept {len(kept)} tokens with the probability {mass:.3g}; the sampled "
                f"one is {'' if token in kept else 'not '}among them",
                REMEDY,
            )
        errors.append(logp - renormalised - math.log(mass))
    return np.array(errors)


def _differences(generated: Json, scored: Json, temperature: float) -> np.ndarray:
    """Errors [n] that must be zero: T (log p_T(a) - log p_T(b)) minus log p_1(a) - log p_1(b), for pairs of tokens."""
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
    """A completion, generated in the same way as rollouts."""
    for seed in range(SAMPLES):  # one completion may have no tokens, by chance
        request = Generate(
            id=tuple(prompt),
            prompt=np.array(prompt, np.int32),
            max_new_tokens=_new_tokens(subject),
            temperature=temperature,
            seed=seed,
        )
        partial = Partial(request)
        await subject.server.extend(partial, subject.server.next_rid(), _version(subject))
        if partial.tokens:
            break
    else:
        raise CheckFailed(f"{SAMPLES} completions have no tokens", "see the server's log")
    return partial


async def _scored(subject: Subject, partial: Partial) -> Scored:
    tokens = np.array(partial.tokens, np.int32)
    score = Score(id=partial.request.id, prompt=partial.request.prompt, tokens=tokens, temperature=1.0)
    scored = await subject.server.score(score, subject.server.next_rid(), _version(subject))
    if scored is None:
        raise CheckFailed("another client aborted a request", "stop the other clients of the server")
    return scored


def _version(subject: Subject) -> int:
    assert subject.server.version is not None, "load weights first"
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

"""Top-p and top-k compared with a naive reference; full-vocabulary sampling in the same batch stays bit-identical."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines_models import drain, engine_of, prompts_of, reference_logprobs, tiny

from sgpo_async.engines import Generate, SampledTokens
from sgpo_async.engines.sampling import distribution, sample, truncate
from sgpo_async.errors import EngineError


def naive_nucleus(probabilities, top_p, top_k=0):
    """Take the most probable tokens until they have `top_p` together or are `top_k`, and renormalise them."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    taken, total = [], 0.0
    for token in order:
        taken.append(token)
        total += probabilities[token]
        if total >= top_p or len(taken) == top_k:
            break
    result = np.zeros(len(probabilities))
    result[taken] = probabilities[taken] / probabilities[taken].sum()
    return result


def truncated(logprobs, top_p, top_k=0):
    rows = len(logprobs)
    limits = torch.full((rows,), top_p, dtype=torch.float64), torch.full((rows,), top_k)
    return truncate(logprobs, *limits).exp()


@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.95, 0.999, 1.0])
def test_the_kept_tokens_equal_the_naive_reference(top_p, top_k):
    logits = torch.from_numpy(np.random.default_rng(0).normal(scale=2, size=(50, 40)))
    found = truncated(torch.log_softmax(logits, -1), top_p, top_k).numpy()
    expected = np.stack([naive_nucleus(row, top_p + (top_p == 1), top_k) for row in torch.softmax(logits, -1).numpy()])
    assert ((found == 0) == (expected == 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_ties_prefer_the_lower_id_and_the_most_probable_token_always_stays():
    quarter = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    assert truncated(quarter, 0.4).tolist() == [[0.5, 0.5, 0, 0]]
    assert truncated(quarter, 1.0, 2).tolist() == [[0.5, 0.5, 0, 0]]
    peaked = torch.tensor([[0.1, 0.9]]).log()
    assert truncated(peaked, 1e-9).tolist() == [[0, 1]]


def test_rows_with_top_p_one_are_bit_identical_beside_rows_with_another_top_p():
    rng = np.random.default_rng(1)
    logits, uniform = torch.from_numpy(rng.normal(size=(6, 32)).astype(np.float32)), torch.from_numpy(rng.random(6))
    temperature = torch.full((6,), 0.6)
    plain = sample(distribution(logits, temperature, np.ones(6), np.zeros(6, np.int64)), uniform)
    top_p, top_k = np.array([1, 0.5, 1, 0.5, 1, 1]), np.array([0, 0, 0, 4, 4, 0])
    mixed = sample(distribution(logits, temperature, top_p, top_k), uniform)
    for before, after in zip(plain, mixed, strict=True):
        assert torch.equal(before[[0, 2, 5]], after[[0, 2, 5]])
    assert (mixed[1][[1, 3, 4]] > plain[1][[1, 3, 4]]).any()


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_samples_from_the_nucleus_with_its_logprobs(deterministic):
    """Every token is in the nucleus of the plain forward at this temperature, and its log-probability is correct."""
    model, plain = tiny("qwen2", spread=2.0), tiny("qwen2", spread=2.0)
    prompts = prompts_of([3, 9, 1, 14])
    requests = [
        Generate(id=i, prompt=p, max_new_tokens=12, temperature=0.6, seed=i, top_p=(1.0, 0.8)[i % 2])
        for i, p in enumerate(prompts)
    ]
    results = drain(engine_of(model, slots=4, deterministic=deterministic), requests)
    np.testing.assert_allclose(
        results[0].logprobs, reference_logprobs(plain, prompts[0], results[0].tokens, 0.6), atol=1e-5
    )
    for i in (1, 3):
        ids = torch.from_numpy(np.concatenate([prompts[i], results[i].tokens])).long()
        with torch.no_grad():
            logits = plain(ids[None, :-1]).logits[0, prompts[i].size - 1 :].double()
        rows = torch.softmax(logits / 0.6, -1).numpy()
        expected = np.array([naive_nucleus(row, 0.8)[t] for row, t in zip(rows, results[i].tokens, strict=True)])
        assert (expected > 0).all()
        np.testing.assert_allclose(results[i].logprobs, np.log(expected), atol=1e-4)


def kept_sets(result: SampledTokens):
    """The kept tokens at each position, with the sampled one."""
    others = np.split(result.kept, np.cumsum(result.kept_sizes)[:-1])
    return [{int(token), *own.tolist()} for token, own in zip(result.tokens, others, strict=True)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_kept_tokens_are_reported_with_renormalised_logprobs(deterministic):
    """Beside requests that do not ask for them, and with a prefix that another engine has begun."""
    model, plain = tiny("qwen2", spread=2.0), tiny("qwen2", spread=2.0)
    limits = [(0.8, 4), (1.0, 3), (0.5, 32), (0.8, 0), (1.0, 0)]
    requests = [
        Generate(id=i, prompt=prompt, max_new_tokens=10, temperature=0.8, seed=i, top_p=p, top_k=k, report_kept=i < 3)
        for i, (prompt, (p, k)) in enumerate(zip(prompts_of([3, 9, 1, 14, 2]), limits, strict=True))
    ]
    results = drain(engine_of(model, slots=4, deterministic=deterministic), requests)
    assert all(results[i].kept is None and results[i].kept_sizes is None for i in (3, 4))
    for request in requests[:3]:
        result = results[request.id]
        ids = torch.from_numpy(np.concatenate([request.prompt, result.tokens])).long()
        with torch.no_grad():
            logits = plain(ids[None, :-1]).logits[0, request.prompt.size - 1 :].double()
        top_p = request.top_p + (request.top_p == 1)
        expected = [naive_nucleus(row, top_p, request.top_k) for row in torch.softmax(logits / 0.8, -1).numpy()]
        assert kept_sets(result) == [set(np.flatnonzero(row).tolist()) for row in expected]
        chosen = [row[token] for row, token in zip(expected, result.tokens, strict=True)]
        np.testing.assert_allclose(result.logprobs, np.log(chosen), atol=1e-4)
    assert len({size for i in range(3) for size in results[i].kept_sizes.tolist()}) > 2

    begun = results[0]
    count = int(begun.kept_sizes[:4].sum())
    prefix = SampledTokens(
        tokens=begun.tokens[:4], logprobs=begun.logprobs[:4], versions=np.array([7], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([4], np.int32), kept=begun.kept[:count], kept_sizes=begun.kept_sizes[:4],
    )  # fmt: skip
    (continued,) = drain(engine_of(model, slots=4), [replace(requests[0], prefix=prefix)]).values()
    assert continued.tokens.tolist() == begun.tokens.tolist()
    assert (continued.kept.tolist(), continued.kept_sizes.tolist()) == (begun.kept.tolist(), begun.kept_sizes.tolist())


def test_next_tokens_are_distributed_as_the_nucleus():
    """Chi-square over the nucleus with 4,000 samples, bounded by Wilson and Hilferty's 0.999 quantile."""
    model, plain = tiny("qwen2", spread=2.0), tiny("qwen2", spread=2.0)
    prompt, draws = prompts_of([6])[0], 4000
    requests = [
        Generate(id=i, prompt=prompt, max_new_tokens=1, temperature=1.0, seed=i, top_p=0.9) for i in range(draws)
    ]
    counts = np.bincount([r.tokens[0] for r in drain(engine_of(model, slots=64), requests).values()], minlength=32)
    with torch.no_grad():
        logits = plain(torch.from_numpy(prompt)[None].long()).logits[0, -1].double()
    expected = draws * naive_nucleus(torch.softmax(logits, -1).numpy(), 0.9)
    inside = expected > 0
    assert 2 <= inside.sum() < 32 and counts[~inside].sum() == 0
    degrees = inside.sum() - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    assert ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum() < bound


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.5])
def test_a_top_p_outside_0_to_1_is_refused(top_p):
    request = Generate(id=0, prompt=prompts_of([3])[0], max_new_tokens=1, temperature=1.0, seed=0, top_p=top_p)
    with pytest.raises(EngineError, match=rf"top_p must be in \(0, 1\], got {top_p}"):
        engine_of(tiny("qwen2")).submit(request)

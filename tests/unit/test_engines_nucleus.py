"""Nucleus sampling compared with a naive reference; full-vocabulary sampling in the same batch stays bit-identical."""

import numpy as np
import pytest
import torch
from engines_models import drain, engine_of, prompts_of, reference_logprobs, tiny

from sgpo_async.engines import Generate
from sgpo_async.engines.sampling import nucleus, sample
from sgpo_async.errors import EngineError


def naive_nucleus(probabilities, top_p):
    """Take the most probable tokens until their total probability reaches `top_p`, and renormalise them."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    taken, total = [], 0.0
    for token in order:
        taken.append(token)
        total += probabilities[token]
        if total >= top_p:
            break
    result = np.zeros(len(probabilities))
    result[taken] = probabilities[taken] / probabilities[taken].sum()
    return result


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.95, 0.999])
def test_the_nucleus_equals_the_naive_reference(top_p):
    logits = torch.from_numpy(np.random.default_rng(0).normal(scale=2, size=(50, 40)))
    found = nucleus(torch.log_softmax(logits, -1), torch.full((50,), top_p, dtype=torch.float64)).exp().numpy()
    expected = np.stack([naive_nucleus(row, top_p) for row in torch.softmax(logits, -1).numpy()])
    assert ((found == 0) == (expected == 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_ties_prefer_the_lower_id_and_the_most_probable_token_always_stays():
    quarter = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    assert nucleus(quarter, torch.tensor([0.4], dtype=torch.float64)).exp().tolist() == [[0.5, 0.5, 0, 0]]
    peaked = torch.tensor([[0.1, 0.9]]).log()
    assert nucleus(peaked, torch.tensor([1e-9], dtype=torch.float64)).exp().tolist() == [[0, 1]]


def test_rows_with_top_p_one_are_bit_identical_beside_rows_with_another_top_p():
    rng = np.random.default_rng(1)
    logits, uniform = torch.from_numpy(rng.normal(size=(6, 32)).astype(np.float32)), torch.from_numpy(rng.random(6))
    temperature = torch.full((6,), 0.6)
    plain = sample(logits, temperature, np.ones(6), uniform)
    mixed = sample(logits, temperature, np.array([1, 0.5, 1, 0.5, 0.5, 1]), uniform)
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

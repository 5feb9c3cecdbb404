"""The embedded engine's samples and log-probabilities, compared with transformers' own forward pass."""

import numpy as np
import pytest
import torch
from engines_models import MODELS, NO_END, drain, engine_of, prompts_of, reference_logprobs, tiny

from sgpo_async.engines import Generate


def make_requests(prompts, *, tokens=12, temperature=1.0, seed=0):
    return [
        Generate(id=i, prompt=p, max_new_tokens=tokens, temperature=temperature, seed=seed + i)
        for i, p in enumerate(prompts)
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_sampling_near_temperature_zero_is_greedy_decoding(kind):
    model = tiny(kind)
    prompts = prompts_of([3, 9, 1, 14, 5])
    results = drain(engine_of(model, slots=2), make_requests(prompts, temperature=1e-4))
    plain = tiny(kind)
    for i, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt)[None].long()
        greedy = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert results[i].tokens.tolist() == greedy[0, prompt.size :].tolist()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_a_teacher_forced_forward(kind, temperature):
    """Mixed lengths, shared prompts, and more requests than slots, so that rows are reused while others run."""
    model, plain = tiny(kind), tiny(kind)
    prompts = [prompt for prompt in prompts_of([1, 2, 30, 7, 19, 3, 11, 2, 24, 5]) for _ in range(3)]
    requests = make_requests(prompts, tokens=7, temperature=temperature)
    requests = [Generate(**{**vars(r), "max_new_tokens": 3 + r.id % 11}) for r in requests]
    results = drain(engine_of(model, slots=8), requests)
    assert len(results) == 30
    for request in requests:
        got = results[request.id]
        assert got.tokens.size == request.max_new_tokens and got.finish == "length"
        expected = reference_logprobs(plain, request.prompt, got.tokens, temperature)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-5)


def test_the_cache_grows_past_its_first_capacity():
    model, plain = tiny("qwen2"), tiny("qwen2")
    prompt = prompts_of([5])[0]
    long, short = drain(engine_of(model, slots=2), make_requests([prompt, prompt], tokens=150)).values()
    for got in (long, short):
        np.testing.assert_allclose(got.logprobs, reference_logprobs(plain, prompt, got.tokens, 1.0), atol=1e-5)


def test_a_sampled_end_token_ends_the_sequence_and_is_kept():
    model = tiny("qwen2")
    results = drain(engine_of(model, slots=8, end_ids=range(10)), make_requests(prompts_of([4] * 40), tokens=30))
    assert "stop" in {r.finish for r in results.values()}
    for result in results.values():
        ends = np.flatnonzero(result.tokens < 10)
        if result.finish == "stop":
            assert ends.tolist() == [result.tokens.size - 1]
        else:
            assert ends.size == 0 and result.tokens.size == 30


def test_next_tokens_are_distributed_as_the_softmax():
    """Chi-square over the vocabulary, 4,000 draws; 0.999 quantile for V - 1 = 31 degrees of freedom is 61.1."""
    model, plain = tiny("qwen2", spread=2.0), tiny("qwen2", spread=2.0)
    prompt, draws, temperature = prompts_of([6])[0], 4000, 1.3
    results = drain(engine_of(model, slots=64), make_requests([prompt] * draws, tokens=1, temperature=temperature))
    counts = np.bincount([r.tokens[0] for r in results.values()], minlength=32)
    with torch.no_grad():
        logits = plain(torch.from_numpy(prompt)[None].long()).logits[0, -1].double()
    expected = draws * torch.softmax(logits / temperature, -1).numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 61.1


def test_successive_tokens_of_one_seed_are_independent():
    """With a model that predicts uniformly, pairs of successive tokens are uniform over V^2."""
    model = tiny("qwen2", vocabulary=4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    results = drain(engine_of(model, slots=64), make_requests(prompts_of([2] * 400, vocabulary=4), tokens=20))
    pairs = np.concatenate([r.tokens[:-1] * 4 + r.tokens[1:] for r in results.values()])
    counts = np.bincount(pairs, minlength=16)
    expected = pairs.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 0.999 quantile, 15 degrees of freedom


def test_results_do_not_depend_on_the_batch():
    prompts = prompts_of(range(2, 26))
    requests = make_requests(prompts, tokens=10)
    together = drain(engine_of(tiny("qwen2"), slots=16), requests)
    for request in requests[::5]:
        alone = drain(engine_of(tiny("qwen2"), slots=3), [request])[request.id]
        assert alone.tokens.tolist() == together[request.id].tokens.tolist()
        np.testing.assert_allclose(alone.logprobs, together[request.id].logprobs, atol=1e-5)


def test_equal_seeds_give_equal_tokens_and_different_seeds_give_different_ones():
    prompt = prompts_of([6])[0]
    requests = [
        Generate(id=i, prompt=prompt, max_new_tokens=16, temperature=1.0, seed=s) for i, s in enumerate([7, 7, 8])
    ]
    first, second, other = drain(engine_of(tiny("qwen2"), slots=4), requests).values()
    assert first.tokens.tolist() == second.tokens.tolist() != other.tokens.tolist()


def test_deterministic_results_are_bit_identical_under_any_load():
    requests = make_requests(prompts_of([3, 17, 8, 1]), tokens=20)
    alone = drain(engine_of(tiny("qwen2"), slots=64, deterministic=True), requests[:1])[0]
    noise = [Generate(**{**vars(r), "id": f"noise {r.id}"}) for r in make_requests(prompts_of(range(5, 13)), tokens=30)]
    busy = drain(engine_of(tiny("qwen2"), slots=64, deterministic=True), [*noise, *requests])[0]
    assert alone.tokens.tobytes() == busy.tokens.tobytes()
    assert alone.logprobs.tobytes() == busy.logprobs.tobytes()


def test_end_ids_come_from_the_model_unless_given():
    model = tiny("qwen2")
    model.generation_config.eos_token_id = list(range(32))
    requests = make_requests(prompts_of([4]), tokens=5)
    assert drain(engine_of(model, end_ids=None), requests)[0].finish == "stop"
    assert drain(engine_of(model, end_ids=NO_END), requests)[0].finish == "length"

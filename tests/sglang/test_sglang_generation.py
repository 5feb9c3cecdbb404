"""The completions and scores of servers agree with the learner's model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang_support import (
    VOCABULARY,
    Servers,
    assert_kept,
    assert_most_likely,
    assert_teacher_forced,
    completion,
    loaded,
    logprobs,
    post,
    score_request,
    version_of,
)

from sgpo_async.engines import Generate, Generated, SampledTokens, Score
from sgpo_async.engines.base import ScoredCanary
from sgpo_async.errors import EngineError
from sgpo_async.model.canary import Canary
from sgpo_async.weights.short_digest import short_digest

pytestmark = [pytest.mark.sglang, pytest.mark.process]


def assert_greedy(url: str, model: object) -> None:
    """The server's greedy tokens equal those of transformers."""
    for seed in range(8):
        prompt = completion(0, length=5 + seed, seed=seed).prompt.tolist()
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}}
        status, answer = post(url, "/generate", body)
        assert status == 200
        with torch.no_grad():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)  # without it, transformers takes token 0 for padding
            options = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": None}
            expected = model.generate(ids, attention_mask=mask, **options)  # type: ignore[attr-defined]
        assert answer["output_ids"] == expected[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_qwen3(pair: Servers, models: dict[str, Path]) -> None:
    pair.load(models["qwen3"], 0)
    assert_greedy(pair.engine.server_slots[0].url, loaded(models["qwen3"]))


def test_greedy_equals_transformers_qwen2(models: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2 has biases, and here tied embeddings; the weights come from an update, not from the server's folder."""
    with Servers(models["qwen2-other"], tmp_path) as servers:
        servers.load(models["qwen2"], 3)
        assert_greedy(servers.engine.server_slots[0].url, loaded(models["qwen2"]))
        requests = [completion(i, length=4 + i, seed=i) for i in range(8)]
        for request in requests:
            servers.engine.submit(request)
        assert_teacher_forced({3: loaded(models["qwen2"])}, requests, servers.results(8))


def test_each_server_scores_the_canary_and_each_span_has_the_digest_that_it_verified(
    pair: Servers, models: dict[str, Path]
) -> None:
    canary = Canary(np.arange(8, dtype=np.int32), np.arange(20, 44, dtype=np.int32))
    folders = {7: models["qwen3"], 8: models["qwen3-other"]}
    pair.load(models["qwen3"], 6)
    pair.engine.watch(canary, every_s=0.2)
    found: list[ScoredCanary] = []
    urls = {slot.url for slot in pair.engine.server_slots}

    def scored(version: int, times: int) -> bool:
        found.extend(pair.engine.canaries())
        return all(sum((one.engine, one.version) == (url, version) for one in found) >= times for url in urls)

    for version, folder in folders.items():
        pair.load(folder, version)
        pair.until(lambda: scored(version, 3), f"three scores of each server under version {version}")  # noqa: B023
        pair.engine.submit(completion(version))
        (result,) = pair.results(1).values()
        assert isinstance(result, Generated)
        assert result.versions.tolist() == [version]
        assert result.digests.tolist() == [pair.engine.digest] == [short_digest(version_of(folder, version).digest)]
    pair.engine.watch(canary, every_s=1e9)
    for one in found:
        if one.version in folders:
            folder = folders[one.version]
            assert one.digest == short_digest(version_of(folder, one.version).digest)
            expected = logprobs(loaded(folder), canary.prompt, canary.tokens)
            np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_the_sampled_distribution(
    pair: Servers, models: dict[str, Path], temperature: float
) -> None:
    pair.load(models["qwen3"], 0)
    requests = [completion(i, length=3 + i % 9, seed=i, temperature=temperature) for i in range(48)]
    for request in requests:
        pair.engine.submit(request)
    results = pair.results(48)
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, results)
    assert all(result.tokens.size == 40 and result.finish == "length" for result in results.values())
    assert len({result.tokens.tobytes() for result in results.values()}) == 48


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_likely_tokens_are_those_of_the_sampled_distribution(
    pair: Servers, models: dict[str, Path], temperature: float
) -> None:
    """Co-running requests ask for different numbers of likely tokens, or for none."""
    pair.load(models["qwen3"], 0)
    numbers = [0, 1, 5, 16, 3, 0, 64, 2] * 4
    requests = [
        replace(completion(i, length=3 + i % 9, seed=i, temperature=temperature), top_logprobs_num=k)
        for i, k in enumerate(numbers)
    ]
    for request in requests:
        pair.engine.submit(request)
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, pair.results(len(requests)))


def test_samples_follow_the_distribution(pair: Servers, models: dict[str, Path]) -> None:
    """600 first tokens of one prompt: their total variation distance from softmax(z) is within sampling error."""
    pair.load(models["qwen3"], 0)
    prompt = completion(0).prompt
    for i in range(600):
        pair.engine.submit(Generate(id=i, prompt=prompt, max_new_tokens=1, temperature=1.0, seed=i))
    tokens = [int(result.tokens[0]) for result in pair.results(600).values()]
    all_tokens = np.arange(VOCABULARY, dtype=np.int32)
    p = np.exp([logprobs(loaded(models["qwen3"]), prompt, all_tokens[i : i + 1])[0] for i in range(VOCABULARY)])
    q = np.bincount(tokens, minlength=VOCABULARY) / 600
    rng = np.random.default_rng(0)
    by_chance = [np.abs(rng.multinomial(600, p / p.sum()) / 600 - p).sum() / 2 for _ in range(200)]
    assert np.abs(q - p).sum() / 2 <= max(by_chance)


def test_evaluation_samples_from_the_nucleus(pair: Servers, models: dict[str, Path]) -> None:
    """At temperature 0.6, first tokens are in the nucleus with top-p 0.8, but not all of them with top-p 1.

    The log-probabilities are those over the vocabulary, because an evaluation does not ask for the kept tokens.
    """
    pair.load(models["qwen3"], 0)
    prompt = completion(0).prompt
    cut = {i: replace(completion(i, tokens=1, temperature=0.6), top_p=0.8) for i in range(300)}
    whole = {i: completion(i, tokens=1, temperature=0.6) for i in range(300, 600)}
    for request in (cut | whole).values():
        pair.engine.submit(request)
    results = pair.results(600)
    model, tokens = loaded(models["qwen3"]), np.arange(VOCABULARY, dtype=np.int32)
    p = np.exp([logprobs(model, prompt, tokens[i : i + 1], 0.6)[0] for i in range(VOCABULARY)])
    order = np.argsort(-p)
    nucleus = set(order[: np.searchsorted(np.cumsum(p[order]), 0.8) + 1].tolist())
    drawn = {kind: [int(results[i].tokens[0]) for i in asked] for kind, asked in (("cut", cut), ("whole", whole))}
    assert set(drawn["cut"]) <= nucleus and not set(drawn["whole"]) <= nucleus
    assert_teacher_forced({0: model}, list((cut | whole).values()), results)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_truncated_completions_report_what_was_kept(pair: Servers, models: dict[str, Path], temperature: float) -> None:
    """Beside completions that do not ask for it, with likely tokens, and continued from a prefix."""
    pair.load(models["qwen3"], 0)
    limits = [(0.95, 64), (1.0, 3), (0.05, 64), (0.9, 2)]
    requests = [
        replace(
            completion(i, length=3 + i % 9, seed=i, temperature=temperature),
            top_p=limits[i % 4][0], top_k=limits[i % 4][1], report_kept=True, top_logprobs_num=i % 3,
        )
        for i in range(24)
    ]  # fmt: skip
    plain = [completion(i, seed=i, temperature=temperature) for i in range(24, 32)]
    for request in (*requests, *plain):
        pair.engine.submit(request)
    results, reference = pair.results(32), {0: loaded(models["qwen3"])}
    assert_teacher_forced(reference, plain, results)
    for request in requests:
        assert_kept(reference, request, results[request.id])
        assert_most_likely(reference, request, results[request.id])
    sizes = np.concatenate([results[request.id].kept_sizes for request in requests])
    assert sizes.min() == 0 and sizes.max() > 5

    begun, count = results[0], int(results[0].kept_sizes[:10].sum())
    prefix = SampledTokens(
        tokens=begun.tokens[:10], logprobs=begun.logprobs[:10], versions=begun.versions,
        digests=begun.digests, ends=np.array([10], np.int32),
        kept=begun.kept[:count], kept_sizes=begun.kept_sizes[:10],
    )  # fmt: skip
    continued = replace(requests[0], id="continued", prefix=prefix)
    pair.engine.submit(continued)
    result = pair.results(1)["continued"]
    assert result.tokens[:10].tolist() == begun.tokens[:10].tolist()
    assert_kept(reference, continued, result)


def test_scores_are_teacher_forced(pair: Servers, models: dict[str, Path]) -> None:
    """Eq. 4, with prompts that are in the prefix cache and prompts that are not, beside running completions."""
    pair.load(models["qwen3"], 0)
    model = loaded(models["qwen3"])
    prompts = [completion(0, length=1 + i, seed=i % 3).prompt for i in range(12)]
    scores = [score_request(("s", i), prompt, length=1 + 2 * i) for i, prompt in enumerate(prompts)]
    for i, score in enumerate(scores):
        pair.engine.submit(completion(i))
        pair.engine.submit(score)
    results = pair.results(24)
    for score in scores:
        expected = logprobs(model, score.prompt, score.tokens)
        np.testing.assert_allclose(results[score.id].logprobs, expected, atol=1e-4)
        assert results[score.id].version == 0


def test_an_end_token_ends_a_completion(models: dict[str, Path], tmp_path: Path) -> None:
    """An end token of the model's configuration is the last token of the completion."""
    folder = tmp_path / "ends"
    model = loaded(models["qwen3"])
    model.config.eos_token_id = model.generation_config.eos_token_id = [5, 6, 7, 8, 9, 10, 11, 12]
    model.save_pretrained(folder)
    with Servers(folder, tmp_path) as servers:
        servers.load(folder, 0)
        for i in range(32):
            servers.engine.submit(completion(i, seed=i, tokens=100))
        results = servers.results(32)
    stopped = [result for result in results.values() if result.finish == "stop"]
    assert len(stopped) > 16
    for result in results.values():
        inside = result.tokens[:-1] if result.finish == "stop" else result.tokens
        assert not np.isin(inside, np.arange(5, 13)).any()
    assert all(5 <= result.tokens[-1] <= 12 for result in stopped)
    assert_teacher_forced({0: model}, [completion(i, seed=i, tokens=100) for i in range(32)], results)


def test_invalid_requests_are_refused_before_they_are_sent(pair: Servers) -> None:
    for request, message in [
        (
            Generate(id=1, prompt=np.array([VOCABULARY], np.int32), max_new_tokens=1, temperature=1.0, seed=0),
            r"token ids must be in \[0, 95\], got 96 to 96; use the tokenizer of this model",
        ),
        (completion(1, length=500, tokens=13), "exceed the model's 506 positions"),
        (completion(1, temperature=0.0), "temperature must be > 0, got 0.0"),
        (
            completion(1, temperature=1e-7),
            "temperature must be >= 1e-05, below which SGLang decodes greedily, got 1e-07",
        ),
        (
            Score(id=1, prompt=completion(1).prompt, tokens=completion(1).prompt, temperature=0.7),
            "temperature of a score must be 1, the only one SGLang supports, got 0.7",
        ),
    ]:
        with pytest.raises(EngineError, match=message):
            pair.engine.submit(request)

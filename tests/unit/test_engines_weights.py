"""Weight updates between two tokens, and weights that the embedded engine must not serve."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines_models import (
    VOCABULARY,
    digest,
    drain,
    engine_of,
    prompts_of,
    reference_distributions,
    reference_logprobs,
    tiny,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.engines import EmbeddedEngine, Generate, Score, Weights
from sgpo_async.engines.sequences import Sequence
from sgpo_async.errors import EngineError, WeightsError
from sgpo_async.model.canary import Canary
from sgpo_async.weights.short_digest import short_digest


def load(engine, version, model):
    tensors = weights(model)
    engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))


def ask(id, *, tokens=20, prompt=6):
    return Generate(id=id, prompt=prompts_of([prompt], seed=id)[0], max_new_tokens=tokens, temperature=1.0, seed=id)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2"])
def test_each_token_has_the_logprob_of_the_version_that_its_span_names(kind):
    """Ten sequences on four slots; weights change after 5, 9 and 30 steps, in the middle of most sequences."""
    policies = {version: tiny(kind, seed=version) for version in range(4)}
    engine, results = engine_of(tiny(kind), slots=4), {}
    for id in range(10):
        engine.submit(ask(id, tokens=15 + id, prompt=2 + 3 * id))
    for step in range(1, 200):
        results |= {r.id: r for r in engine.step(0.0)}
        if step in (5, 9, 30):
            load(engine, {5: 1, 9: 2, 30: 3}[step], policies[{5: 1, 9: 2, 30: 3}[step]])
    assert len(results) == 10
    assert sum(r.versions.size for r in results.values()) > 14
    for id, got in results.items():
        assert got.tokens.size == 15 + id
        prompt = ask(id, prompt=2 + 3 * id).prompt
        for version, start, end in zip(got.versions, [0, *got.ends[:-1]], got.ends, strict=True):
            expected = reference_logprobs(policies[int(version)], prompt, got.tokens[:end], 1.0)[start:]
            np.testing.assert_allclose(got.logprobs[start:end], expected, atol=1e-5)


def test_top_tokens_are_those_of_the_version_that_each_span_names():
    """Three slots; requests ask for different numbers of tokens, or none; weights change in the middle of sequences."""
    policies = {version: tiny("qwen3", seed=version) for version in range(3)}
    engine, results = engine_of(tiny("qwen3"), slots=3), {}
    top_counts = [0, 5, 2, 31, 0, 4, 5]
    requests = [
        replace(ask(id, tokens=60 + id, prompt=4), top_logprobs_num=k, temperature=0.8)
        for id, k in enumerate(top_counts)
    ]
    for request in requests:
        engine.submit(request)
    for step in range(1, 600):
        results |= {r.id: r for r in engine.step(0.0)}
        if step in (20, 50):
            load(engine, {20: 1, 50: 2}[step], policies[{20: 1, 50: 2}[step]])
    assert len(results) == len(top_counts)
    assert max(r.versions.size for r in results.values()) == 3
    for request, k in zip(requests, top_counts, strict=True):
        got = results[request.id]
        if not k:
            assert (got.top_tokens, got.top_logprobs) == (None, None)
            continue
        tokens, logprobs = (array.reshape(got.tokens.size, k) for array in (got.top_tokens, got.top_logprobs))
        for version, start, end in zip(got.versions, [0, *got.ends[:-1]], got.ends, strict=True):
            model = policies[int(version)]
            expected = reference_distributions(model, request.prompt, got.tokens[:end], 0.8)[start:]
            np.testing.assert_allclose(logprobs[start:end], -np.sort(-expected)[:, :k], atol=1e-5)
            chosen = np.take_along_axis(expected, tokens[start:end].astype(np.int64), -1)
            np.testing.assert_allclose(logprobs[start:end], chosen, atol=1e-5)
        assert all(len(set(row)) == k for row in tokens.tolist())


def test_requesting_top_tokens_does_not_change_the_sample():
    plain = drain(engine_of(tiny("qwen2")), [ask(id) for id in range(4)])
    with_top_tokens = drain(engine_of(tiny("qwen2")), [replace(ask(id), top_logprobs_num=id) for id in range(4)])
    for id, got in with_top_tokens.items():
        assert np.array_equal(got.tokens, plain[id].tokens) and np.array_equal(got.logprobs, plain[id].logprobs)


def test_running_sequences_continue_before_waiting_ones_start():
    engine = engine_of(tiny("qwen2"), slots=2)
    for id in range(6):
        engine.submit(ask(id))
    for _ in range(5):
        engine.step(0.0)
    load(engine, 1, tiny("qwen2", seed=1))
    finished = [r.id for _ in range(20) for r in engine.step(0.0)]
    assert finished == [0, 1]


def test_loading_the_same_weights_changes_no_token():
    model, requests = tiny("qwen2"), [ask(id) for id in range(3)]
    undisturbed = drain(engine_of(tiny("qwen2")), requests)
    engine = engine_of(model)
    for request in requests:
        engine.submit(request)
    results = {}
    for version in range(1, 30):
        results |= {r.id: r for r in engine.step(0.0)}
        load(engine, version, model)
    for id, got in results.items():
        assert got.tokens.tolist() == undisturbed[id].tokens.tolist()
        assert got.versions.tolist() == list(range(20)) and got.ends.tolist() == list(range(1, 21))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12), st.integers(1, 3))
def test_spans_cover_the_tokens_and_name_their_versions(history, last):
    """`history`: pairs (tokens generated, then version increment). The spans must give every token its version."""
    sequence, version, expected = Sequence.of(ask(0, prompt=2)), 0, []

    def generate(count):
        expected.extend([version] * count)
        sequence.ids = np.append(sequence.ids, np.zeros(count, np.int32))

    for count, advance in history:
        generate(count)
        sequence.close_span(version, version)
        version += advance
    generate(last)
    sequence.close_span(version, version)
    got = sequence.result(stopped=False)
    assert np.repeat(got.versions, np.diff(got.ends, prepend=0)).tolist() == expected
    assert (np.diff(got.ends, prepend=0) > 0).all() and (np.diff(got.versions) > 0).all()


def test_each_span_has_the_digest_of_what_the_engine_verified_also_if_a_version_comes_twice():
    engine, digests, spans = engine_of(tiny("qwen3"), slots=2), [], []
    engine.submit(ask(0, tokens=30))
    for version, seed in ((4, 1), (4, 2), (5, 3)):
        for _ in range(6):
            engine.step(0.0)
        load(engine, version, tiny("qwen3", seed=seed))
        digests.append(short_digest(digest(weights(tiny("qwen3", seed=seed)).items())))
        assert engine.digest == digests[-1]
        spans.append(engine.progress([0])[0])
    got = drain(engine)[0]
    assert got.versions.tolist() == [0, 4, 4, 5]
    assert got.digests.dtype == np.int64 and got.digests.tolist()[1:] == digests
    assert len(set(got.digests.tolist())) == 4
    assert spans[1].digests.tolist() == got.digests.tolist()[:2]


def test_a_load_that_fails_its_verification_leaves_no_digest():
    engine = engine_of(tiny("qwen3"))
    tensors = weights(tiny("qwen3", seed=1))
    with pytest.raises(WeightsError, match="serves nothing"):
        engine.load(Weights(version=1, digest="0" * 32, read=tensors.copy))
    assert (engine.version, engine.digest) == (None, 0)


def test_the_canary_is_scored_after_each_load_and_by_the_clock_beside_other_requests():
    model, canary = tiny("qwen3"), Canary(np.arange(3, dtype=np.int32), np.arange(5, 9, dtype=np.int32))
    engine = engine_of(model, slots=2)
    alone = drain(engine, [ask(0)])[0]
    engine.watch(canary, every_s=1e9)
    engine.submit(ask(0))
    for _ in range(4):
        engine.step(0.0)
    load(engine, 1, tiny("qwen3", seed=1))
    for _ in range(4):
        engine.step(0.0)
    first, second = engine.canaries()
    for scored, version, policy in ((first, 0, tiny("qwen3")), (second, 1, tiny("qwen3", seed=1))):
        assert (scored.engine, scored.version) == ("", version)
        expected = reference_logprobs(policy, canary.prompt, canary.tokens, 1.0)
        np.testing.assert_allclose(scored.logprobs, expected, atol=1e-5)
    assert first.digest != second.digest == engine.digest
    assert engine.progress([0])[0].tokens[:3].tolist() == alone.tokens[:3].tolist(), "the canary changes no sample"
    engine.watch(canary, every_s=0.0)
    for _ in range(3):
        engine.step(0.0)
    assert [scored.version for scored in engine.canaries()] == [1, 1, 1]
    assert engine.canaries() == []
    with pytest.raises(EngineError, match="token ids must be in"):
        engine.watch(Canary(canary.prompt, np.array([VOCABULARY], np.int32)), every_s=1.0)


@functools.cache
def engine_with(slots):
    return engine_of(tiny("qwen2"), slots=slots)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_interleaving_of_steps_loads_and_cancels_answers_every_request_once(data):
    engine = engine_with(data.draw(st.integers(1, 3)))
    engine.cancel(range(8))  # a failed example may have left requests
    alive, results = {}, {}
    for id in range(data.draw(st.integers(1, 8))):
        alive[id] = ask(id, tokens=data.draw(st.integers(1, 6)), prompt=data.draw(st.integers(1, 5)))
        engine.submit(alive[id])
    for action in data.draw(st.lists(st.sampled_from(["step", "step", "load", "cancel"]), max_size=25)):
        if action == "step":
            results |= {r.id: r for r in engine.step(0.0)}
        elif action == "load":
            load(engine, engine.version + 1, tiny("qwen2", seed=engine.version % 2))
        elif unfinished := sorted(alive.keys() - results.keys()):
            cancelled = data.draw(st.sampled_from(unfinished))
            engine.cancel([cancelled, "unknown"])
            del alive[cancelled]
    results |= drain(engine)
    assert results.keys() == alive.keys()
    for id, got in results.items():
        assert got.tokens.size == alive[id].max_new_tokens == got.ends[-1] == got.logprobs.size


def test_weights_with_other_names_or_shapes_leave_the_engine_unchanged():
    engine = engine_of(tiny("qwen2"), version=4)
    before = drain(engine, [ask(0)])[0]
    good = weights(tiny("qwen2", seed=1))
    missing = {k: v for k, v in good.items() if "lm_head" not in k}
    extra = good | {"model.more": torch.zeros(1)}
    reshaped = good | {"model.norm.weight": torch.zeros(33)}
    for tensors, message in [(missing, "lm_head.weight"), (extra, "model.more"), (reshaped, r"\(33,\)")]:
        with pytest.raises(WeightsError, match=message):
            engine.load(Weights(version=5, digest=digest(tensors.items()), read=tensors.copy))
        assert engine.version == 4
    after = drain(engine, [ask(0)])[0]
    assert after.logprobs.tobytes() == before.logprobs.tobytes()


def test_after_a_wrong_digest_the_engine_serves_nothing_until_a_load_succeeds():
    engine, results = engine_of(tiny("qwen2")), {}
    engine.submit(ask(0))
    for _ in range(5):
        engine.step(0.0)
    tensors = weights(tiny("qwen2", seed=1))
    message = "version 1: the loaded weights have digest .*, but another was announced; the engine serves nothing"
    with pytest.raises(WeightsError, match=message):
        engine.load(Weights(version=1, digest="another", read=tensors.copy))
    assert engine.version is None and engine.step(0.0) == []
    for request in (ask(1), Score(id=2, prompt=ask(1).prompt, tokens=ask(1).prompt, temperature=1.0)):
        with pytest.raises(EngineError, match="no verified weights"):
            engine.submit(request)
    load(engine, 2, tiny("qwen2", seed=2))
    results = drain(engine)
    assert results[0].versions.tolist() == [0, 2] and results[0].ends.tolist() == [5, 20]


def test_an_engine_serves_nothing_before_its_first_load():
    engine = EmbeddedEngine(tiny("qwen2"), digest=digest)
    assert engine.version is None and engine.step(0.0) == []
    with pytest.raises(EngineError, match="load a version first"):
        engine.submit(ask(0))


def test_after_weights_with_nan_the_engine_serves_nothing_until_a_load_that_removes_every_nan():
    engine = engine_of(tiny("qwen2"), slots=4)
    for id in range(3):
        engine.submit(ask(id))
    engine.step(0.0)
    broken = tiny("qwen2")
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
    load(engine, 1, broken)
    with pytest.raises(EngineError, match="version 1 give NaN logits; publish a version without NaN"):
        drain(engine)
    assert engine.version is None
    load(engine, 2, tiny("qwen2", seed=2))
    for id, got in drain(engine).items():
        expected = reference_logprobs(tiny("qwen2", seed=2), ask(id).prompt, got.tokens, 1.0)
        np.testing.assert_allclose(got.logprobs[got.ends[0] :], expected[got.ends[0] :], atol=1e-5)


def test_weights_of_a_narrower_dtype_are_verified_before_they_are_converted():
    engine, other = engine_of(tiny("qwen2")), tiny("qwen2", seed=1)
    tensors = {name: tensor.bfloat16() for name, tensor in weights(other).items()}
    engine.load(Weights(version=1, digest=digest(tensors.items()), read=tensors.copy))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(tensors[name])
    got = drain(engine, [ask(0)])[0]
    np.testing.assert_allclose(got.logprobs, reference_logprobs(other, ask(0).prompt, got.tokens, 1.0), atol=1e-5)


def test_weights_that_would_be_rounded_are_refused():
    engine = engine_of(tiny("qwen2").bfloat16())
    tensors = weights(tiny("qwen2"))
    message = "the engine's torch.bfloat16 cannot hold the received torch.float32 exactly; use the same model.dtype"
    with pytest.raises(WeightsError, match=message):
        engine.load(Weights(version=1, digest=digest(tensors.items()), read=tensors.copy))
    assert engine.version == 0


def test_tied_weights_are_loaded_as_one_parameter():
    model = tiny("qwen3")
    assert "lm_head.weight" not in weights(model)
    engine = engine_of(model)
    load(engine, 1, tiny("qwen3", seed=1))
    got = drain(engine, [ask(0)])[0]
    expected = reference_logprobs(tiny("qwen3", seed=1), ask(0).prompt, got.tokens, 1.0)
    np.testing.assert_allclose(got.logprobs, expected, atol=1e-5)
    assert got.tokens.max() < VOCABULARY

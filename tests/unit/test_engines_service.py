"""Queueing, cancelling, scoring, validation and other services of the embedded engine around sampling."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines_models import MODELS, VOCABULARY, digest, drain, engine_of, prompts_of, reference_logprobs, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Score, Weights, decoder
from sgpo_async.engines.decode_step import DecodeStep
from sgpo_async.engines.decoder import Decoder, batches
from sgpo_async.engines.sampling import log_softmax, sample, stream, uniforms
from sgpo_async.errors import DataError, EngineError


def ask(id, *, prompt=4, ids=None, tokens=10, seed=0):
    prompt = prompts_of([prompt])[0] if ids is None else np.array(ids, np.int32)
    return Generate(id=id, prompt=prompt, max_new_tokens=tokens, temperature=1.0, seed=seed)


def score(id, *, prompt=4, tokens=5, temperature=1.0):
    first, second = prompts_of([prompt, tokens], seed=id)
    return Score(id=id, prompt=first, tokens=second, temperature=temperature)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_scores_equal_a_teacher_forced_forward(kind):
    """Eq. 4 needs the sum. It must be exact for mixed lengths, also while sequences are running."""
    requests = [score(id, prompt=1 + id, tokens=1 + 2 * id, temperature=0.6 + 0.1 * id) for id in range(9)]
    results = drain(engine_of(tiny(kind), version=3), [*[ask(f"g{i}") for i in range(9)], *requests])
    for request in requests:
        expected = reference_logprobs(tiny(kind), request.prompt, request.tokens, request.temperature)
        np.testing.assert_allclose(results[request.id].logprobs, expected, atol=1e-5)
        assert results[request.id].logprobs.sum() == pytest.approx(expected.sum(), abs=1e-4)
        assert results[request.id].version == 3


@pytest.mark.parametrize("leaves_out", [True, False])
def test_of_a_long_sequence_only_the_logits_of_its_tokens_are_made(leaves_out, monkeypatch):
    """With a large vocabulary the logits of all positions, and their copies, would take tens of GB."""
    request, sizes, rows = score(0, prompt=40, tokens=21, temperature=0.7), [], []
    monkeypatch.setattr(decoder, "_BATCH_LOGITS", 8 * VOCABULARY)
    monkeypatch.setattr(decoder, "log_softmax", lambda z, t: rows.append(len(z)) or log_softmax(z, t))
    engine = engine_of(tiny("qwen2"))
    logits = engine._decoder.logits
    engine._decoder.logits = lambda *given, **more: sizes.append((found := logits(*given, **more)).shape[1]) or found
    engine._decoder._takes_keep &= leaves_out  # not every model can
    found = drain(engine, [request])[0].logprobs
    assert sizes == [21 if leaves_out else 60] and rows == [8, 8, 5]
    expected = reference_logprobs(tiny("qwen2"), request.prompt, request.tokens, request.temperature)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_log_probabilities_are_bit_identical_however_their_rows_are_split(monkeypatch):
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(50) % VOCABULARY
    expected = log_softmax(logits, torch.tensor(0.7)).gather(1, tokens[:, None])[:, 0]
    for count in (1, 7, 50, 64):
        monkeypatch.setattr(decoder, "_BATCH_LOGITS", count * VOCABULARY)
        found = Decoder(tiny("qwen2"), slots=1).logprobs(logits, tokens, 0.7)
        assert found.numpy().tobytes() == expected.numpy().tobytes()


def test_scoring_generated_tokens_gives_their_behaviour_logprobs():
    engine = engine_of(tiny("qwen2"))
    got = drain(engine, [ask(0, tokens=30)])[0]
    scored = drain(engine, [Score(id=1, prompt=ask(0).prompt, tokens=got.tokens, temperature=1.0)])[1]
    np.testing.assert_allclose(scored.logprobs, got.logprobs, atol=1e-5)


def test_deterministic_scores_are_bit_identical_beside_any_other_requests():
    engine = engine_of(tiny("qwen2"), deterministic=True)
    alone = drain(engine, [score(1)])[1]
    together = drain(engine, [score(2, tokens=9), score(1), score(3, prompt=17)])[1]
    assert alone.logprobs.tobytes() == together.logprobs.tobytes()


def test_a_finished_sequence_frees_its_slot_at_once():
    """Two slots and one long request: the short requests use the other slot one after another."""
    engine = engine_of(tiny("qwen2"), slots=2)
    order = list(drain(engine, [ask("long", tokens=60), *[ask(i, tokens=5) for i in range(8)]]))
    assert order[:8] == list(range(8)) and order[8] == "long"


def test_no_request_waits_indefinitely_for_a_full_batch():
    """One request beside a long one on 64 slots: far less than a batch, but it finishes before the long one."""
    engine = engine_of(tiny("qwen2"), slots=64)
    engine.submit(ask("long", tokens=100))
    engine.step(0.0)
    results = [r.id for r in drain(engine, [ask("late", tokens=5), score(7)]).values()]
    assert results == [7, "late", "long"]


def test_cancelling_frees_slots_and_forgets_waiting_requests():
    engine = engine_of(tiny("qwen2"), slots=2)
    for id in range(5):
        engine.submit(ask(id))
    engine.submit(score(9))
    for _ in range(3):
        engine.step(0.0)
    engine.cancel([0, 3, "unknown"])
    assert engine.load_status().running == 1
    assert sorted(drain(engine)) == [1, 2, 4]


def test_cancelling_a_request_does_not_change_other_requests():
    requests = [ask(i, prompt=length, tokens=20, seed=i) for i, length in enumerate([3, 8, 5, 12])]
    undisturbed = drain(engine_of(tiny("qwen2")), requests)
    engine = engine_of(tiny("qwen2"))
    for request in requests:
        engine.submit(request)
    for _ in range(6):
        engine.step(0.0)
    engine.cancel([0, 2])
    results = drain(engine)
    for id in (1, 3):
        assert results[id].tokens.tolist() == undisturbed[id].tokens.tolist()


def test_the_load_status_counts_requests_slots_and_tokens():
    engine = engine_of(tiny("qwen2"), slots=4)
    for id in range(6):
        engine.submit(ask(id, tokens=10))
    engine.submit(score(8))
    engine.step(0.0)
    status = engine.load_status()
    assert (status.running, status.waiting, status.slots, status.tokens) == (4, 2, 4, 4)
    drain(engine)
    assert engine.load_status().tokens == 60
    engine.close()
    assert engine.load_status().running == engine.load_status().waiting == 0 and engine.version is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(0, prompt=100, tokens=157), "100 prompt tokens and up to 157 more exceed the model's 256 positions"),
        (score(0, prompt=250, tokens=7), "256 positions"),
        (ask(0, prompt=0), "prompt and completion must have at least one token each, got 0 and 10"),
        (ask(0, tokens=0), "prompt and completion must have at least one token each, got 4 and 0"),
        (replace(ask(0), top_logprobs_num=32),
         r"top_logprobs_num must be in \[0, 31\], got 32; lower algorithm.teacher_top_k"),
        (ask(0, ids=[1, 32]), r"token ids must be in \[0, 31\], got 1 to 32; use the tokenizer of this model"),
        (ask(0, ids=[-1]), r"token ids must be in \[0, 31\], got -1 to -1; use the tokenizer of this model"),
        (score(0, tokens=1, prompt=1, temperature=float("nan")), "temperature must be > 0, got nan"),
        (score(0, tokens=1, prompt=1, temperature=0.0), "temperature must be > 0, got 0.0"),
    ],
)  # fmt: skip
def test_invalid_requests_are_refused(request_, message):
    engine = engine_of(tiny("qwen2"))
    with pytest.raises(EngineError, match=message):
        engine.submit(request_)
    assert engine.load_status().waiting == 0


def test_the_longest_possible_request_is_served():
    engine = engine_of(tiny("gpt2"))
    assert drain(engine, [ask(0, prompt=200, tokens=56)])[0].tokens.size == 56


def test_a_sliding_window_bounds_the_length():
    model = tiny("qwen2")
    model.config.sliding_window = 16
    with pytest.raises(EngineError, match="16 positions"):
        engine_of(model).submit(ask(0, prompt=10, tokens=7))


def test_a_model_without_a_key_value_cache_is_refused():
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(EngineError, match="cannot decode MambaForCausalLM"):
        EmbeddedEngine(MambaForCausalLM(config), digest=digest)


@pytest.mark.parametrize("kind", MODELS)
def test_the_traced_step_is_bit_identical_for_any_number_of_rows_and_columns(kind):
    decoder = Decoder(tiny(kind), 8)
    plain = DecodeStep(decoder.model, decoder.cache)
    assert not isinstance(decoder._step, DecodeStep)
    with torch.inference_mode():
        for rows, length in [(1, 1), (8, 3), (5, 100), (1, 130), (2, 2)]:
            prompts = prompts_of([length] * rows)
            decoder.prefill(0, [prompt[:-1] for prompt in prompts])
            tokens, positions = np.array([prompt[-1] for prompt in prompts]), np.full(rows, length - 1)
            traced = decoder.decode(tokens.astype(np.int64), positions)
            assert torch.equal(traced, plain(*decoder._inputs(tokens.astype(np.int64), positions)))


def test_a_trace_that_gives_different_logits_is_not_used(monkeypatch):
    monkeypatch.setattr("sgpo_async.engines.decoder.traced", lambda step, *_: lambda *inputs: step(*inputs) + 1)
    assert isinstance(Decoder(tiny("qwen2"), 4)._step, DecodeStep)


def test_from_pretrained_serves_a_saved_model(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    engine = EmbeddedEngine.from_pretrained(str(tmp_path), digest=digest, slots=2, device="cpu")
    named = dict(tiny("qwen3").named_parameters())
    engine.load(Weights(version=0, digest=digest(named.items()), read=named.copy))
    got = drain(engine, [ask(0)])[0]
    expected = reference_logprobs(tiny("qwen3"), ask(0).prompt, got.tokens, 1.0)
    np.testing.assert_allclose(got.logprobs, expected, atol=1e-5)


def test_a_missing_or_broken_model_is_reported_in_one_line(tmp_path):
    def refused(path):
        with pytest.raises(DataError) as error:
            EmbeddedEngine.from_pretrained(str(path), digest=digest, device="cpu")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    assert "no such folder" in refused(tmp_path / "absent")
    assert "no config.json" in refused(tmp_path)
    folder = tmp_path / "model"
    tiny("qwen2").save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert "cannot load" in refused(folder)
    file.unlink()
    assert "cannot load" in refused(folder)
    file.write_bytes(whole)
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "lacks 1 parameters that its config.json requires (model.norm.weight)" in refused(folder)
    file.write_bytes(whole)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 32', '"vocab_size": 33'))
    assert "cannot load" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "cannot load" in refused(folder)


def test_an_unavailable_device_is_an_engine_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny("qwen2").save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"engine\.device"):
        EmbeddedEngine.from_pretrained(str(tmp_path), digest=digest, device="cuda")


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**20))
def test_uniforms_are_below_1_and_depend_only_on_seed_and_index(seed, index):
    streams = np.array([stream(0), stream(seed)])
    got = uniforms(streams, np.array([3, index]))
    assert (got >= 0).all() and (got <= 1 - 2.0**-50).all()
    assert uniforms(streams[1:], np.array([index]))[0] == got[1]


def test_uniforms_are_uniform_along_a_stream_and_across_neighbouring_seeds():
    along = uniforms(np.full(20_000, stream(5)), np.arange(20_000))
    across = uniforms(np.array([stream(seed) for seed in range(20_000)]), np.zeros(20_000, np.int64))
    for values in (along, across):
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 85.4  # 0.999 quantile, 49 degrees of freedom
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.499999, 0.5, 1 - 2.0**-50], dtype=torch.float64)
    tokens, logprobs = sample(torch.log_softmax(logits, -1), uniform)
    assert tokens.tolist() == [1, 1, 3, 3]
    assert torch.allclose(logprobs, torch.full((4,), -np.log(2.0), dtype=torch.float32))


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_batches_cover_every_item_once_and_keep_the_limit(lengths, limit):
    parts = batches(lengths, limit)
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(len(lengths)))
    for start, stop in parts:
        assert stop == start + 1 or (stop - start) * max(lengths[start:stop]) <= limit


def test_results_are_generated_records():
    got = drain(engine_of(tiny("qwen2")), [ask(0)])[0]
    assert isinstance(got, Generated)
    assert (got.tokens.dtype, got.logprobs.dtype, got.versions.dtype, got.ends.dtype) == (
        np.int32, np.float32, np.int32, np.int32
    )  # fmt: skip

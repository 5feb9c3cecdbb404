"""Generations that begin with tokens that are already sampled, and what unfinished generations have sampled so far."""

from dataclasses import replace

import numpy as np
import pytest
from engines_models import MODELS, digest, drain, engine_of, prompts_of, reference_logprobs, tiny, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.engines import Generate, SampledTokens, Score, Weights
from sgpo_async.errors import EngineError, WeightsError

TOKENS = 12
ENDS = range(4)  # of 32 token ids: some completions stop, some reach their length


def ask(id, *, prompt=5, tokens=TOKENS, k=0, temperature=0.9):
    return Generate(
        id=id, prompt=prompts_of([prompt], seed=id)[0], max_new_tokens=tokens, temperature=temperature, seed=id,
        top_logprobs_num=k,
    )  # fmt: skip


def load(engine, version, model):
    tensors = weights(model)
    engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))


def cut(whole, count, k=0):
    """The first `count` tokens of a completion."""
    spans = int(np.searchsorted(whole.ends, count)) + 1
    return SampledTokens(
        tokens=whole.tokens[:count],
        logprobs=whole.logprobs[:count],
        versions=whole.versions[:spans],
        digests=whole.digests[:spans],
        ends=np.minimum(whole.ends[:spans], count),
        top_tokens=whole.top_tokens[: count * k] if k else None,
        top_logprobs=whole.top_logprobs[: count * k] if k else None,
    )


def assert_same(got, expected, *, atol=1e-5):
    """Equal in everything but the last bits of log-probabilities."""
    for name in ("tokens", "versions", "ends", "top_tokens"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or one.tolist() == other.tolist(), name
        assert one is None or one.dtype == other.dtype, name
    for name in ("logprobs", "top_logprobs"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype == np.float32
            np.testing.assert_allclose(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_completion_cut_at_any_position_continues_as_if_it_had_not_been_cut(kind):
    """On another engine, beside other sequences."""
    asked = [ask(id, prompt=2 + 3 * id, k=id % 3) for id in range(8)]
    whole = drain(engine_of(tiny(kind), slots=3, end_ids=ENDS), asked)
    assert {result.finish for result in whole.values()} == {"stop", "length"}
    cuts = [(request, count) for request in asked for count in range(1, whole[request.id].tokens.size)]
    assert len(cuts) > 40
    continued = drain(
        engine_of(tiny(kind), slots=16, end_ids=ENDS),
        [
            replace(r, id=(r.id, count), prefix=cut(whole[r.id], count, r.top_logprobs_num))
            for r, count in cuts
        ],
    )  # fmt: skip
    for request, count in cuts:
        got, expected = continued[request.id, count], whole[request.id]
        assert_same(got, expected)
        assert got.finish == expected.finish
        assert got.logprobs[:count].tobytes() == expected.logprobs[:count].tobytes()


def test_a_prefix_is_kept_and_what_follows_is_of_the_engine_that_sampled_it():
    """The prefix names versions that this engine never had, and tokens that it would not have sampled."""
    prefix = SampledTokens(
        tokens=np.array([31, 7, 7, 9], np.int32), logprobs=np.array([-1, -2, -3, -4], np.float32),
        versions=np.array([8, 5], np.int32),
        digests=np.zeros(2, np.int64), ends=np.array([3, 4], np.int32),
    )  # fmt: skip
    request = replace(ask(1), prefix=prefix)
    got = drain(engine_of(tiny("qwen2"), version=2), [request])[1]
    assert got.tokens[:4].tolist() == [31, 7, 7, 9] and got.logprobs[:4].tolist() == [-1, -2, -3, -4]
    assert (got.versions.tolist(), got.ends.tolist(), got.finish) == ([8, 5, 2], [3, 4, TOKENS], "length")
    expected = reference_logprobs(tiny("qwen2"), request.prompt, got.tokens, 0.9)
    np.testing.assert_allclose(got.logprobs[4:], expected[4:], atol=1e-5)


def test_only_sampled_tokens_count_as_generated():
    engine = engine_of(tiny("qwen2"))
    whole = drain(engine, [ask(1)])[1]
    drain(engine, [replace(ask(1), prefix=cut(whole, 9))])
    assert engine.load_status().tokens == TOKENS + 3


SCHEDULE = {3: 1, 7: 2, 8: 3}
"""Versions that are loaded after so many steps."""


def run(engine, policies, first_step, *, record=None):
    """Step until the only request is finished, with the weight updates of SCHEDULE; returns its result."""
    for step in range(first_step, 100):
        if finished := engine.step(0.0):
            return finished[0]
        if step in SCHEDULE:
            load(engine, SCHEDULE[step], policies[SCHEDULE[step]])
        if record is not None:
            record.append(engine.progress([1])[1])
    raise AssertionError("not finished")


def test_a_completion_of_several_versions_continues_from_the_progress_at_any_step():
    """The other engine gets the same updates at the same tokens, so tokens and spans are those of the first."""
    policies = {version: tiny("qwen3", seed=version) for version in range(4)}
    records = []
    first = engine_of(tiny("qwen3"))
    first.submit(ask(1, k=2))
    whole = run(first, policies, 1, record=records)
    assert whole.versions.tolist() == [0, 1, 2, 3] and whole.ends.tolist() == [3, 7, 8, TOKENS]
    assert [progress.tokens.size for progress in records] == list(range(1, TOKENS))
    for step, progress in enumerate(records, 1):
        assert_same(progress, cut(whole, step, 2), atol=0)
        second = engine_of(tiny("qwen3"))
        version = max([0, *(v for at, v in SCHEDULE.items() if at <= step)])
        load(second, version, policies[version])
        second.submit(replace(ask(1, k=2), prefix=progress))
        assert_same(run(second, policies, step + 1), whole)


def test_the_progress_of_a_request_in_every_state():
    engine = engine_of(tiny("qwen2"), slots=1)
    ids = ["unknown", 1, 2, 3, 4]
    given = SampledTokens(
        tokens=np.array([9, 8], np.int32), logprobs=-np.ones(2, np.float32), versions=np.array([0], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([2], np.int32),
    )  # fmt: skip
    for id in (1, 2):
        engine.submit(ask(id))
    engine.submit(replace(ask(3), prefix=given))
    engine.submit(Score(id=4, prompt=ask(4).prompt, tokens=ask(5).prompt, temperature=1.0))

    def sizes():
        return {id: progress.tokens.size for id, progress in engine.progress(ids).items()}

    assert sizes() == {3: 2}  # 1 and 2 wait without a token
    assert_same(engine.progress([3])[3], given, atol=0)
    for count in (1, 2, 3):
        engine.step(0.0)
        assert sizes() == {1: count, 3: 2}
    assert engine.progress([2]) == {}
    load(engine, 1, tiny("qwen2", seed=1))
    assert sizes() == {1: 3, 3: 2}  # it waits for a slot again
    engine.step(0.0)
    progress = engine.progress(iter(ids))[1]
    assert (progress.versions.tolist(), progress.ends.tolist()) == ([0, 1], [3, 4])
    tensors = weights(tiny("qwen2", seed=2))
    with pytest.raises(WeightsError):
        engine.load(Weights(version=2, digest="another", read=tensors.copy))
    assert sizes() == {1: 4, 3: 2}  # the engine serves nothing
    load(engine, 3, tiny("qwen2", seed=3))
    finished = [result.id for _ in range(TOKENS - 4) for result in engine.step(0.0)]
    assert finished == [1]
    engine.step(0.0)
    assert sizes() == {2: 1, 3: 2}
    engine.cancel([2])
    assert sizes() == {3: 2}
    engine.step(0.0)
    assert sizes() == {3: 3}
    assert engine.progress([3])[3].versions.tolist() == [0, 3]
    engine.reset()
    assert sizes() == {}


def test_asking_for_progress_at_every_step_changes_no_bit_and_gives_copies():
    asked = [ask(id, prompt=2 + id, k=id % 3) for id in range(7)]
    undisturbed = drain(engine_of(tiny("qwen2"), slots=3), asked)
    engine, results, seen = engine_of(tiny("qwen2"), slots=3), {}, []
    for request in asked:
        engine.submit(request)
    while len(results) < 7:
        results |= {result.id: result for result in engine.step(0.0)}
        seen += engine.progress(range(7)).items()
        for progress in engine.progress(range(7)).values():
            for array in vars(progress).values():
                if array is not None:
                    array[:] = 0
    for id, got in results.items():
        assert_same(got, undisturbed[id], atol=0)
    assert len(seen) == 7 * (TOKENS - 1)
    for id, progress in seen:
        assert_same(progress, cut(undisturbed[id], progress.tokens.size, id % 3), atol=0)


def test_progress_gives_copies_of_what_waits_for_a_slot_again():
    model, request = tiny("qwen2"), ask(1, k=2)
    whole = drain(engine_of(tiny("qwen2")), [request])[1]
    engine = engine_of(model)
    engine.submit(request)
    for _ in range(3):
        engine.step(0.0)
    load(engine, 0, model)
    for array in vars(engine.progress([1])[1]).values():
        if array is not None:
            array[:] = 0
    assert_same(drain(engine)[1], whole)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_moves_between_two_engines_change_no_token_and_name_who_sampled_it(data):
    """Both engines have the same weights under different version numbers; sequences move at arbitrary moments."""
    asked = [ask(id, prompt=2 + id, tokens=8, k=id % 2) for id in range(4)]
    whole = drain(engine_of(tiny("qwen2"), end_ids=ENDS), asked)
    engines = [engine_of(tiny("qwen2"), slots=2, end_ids=ENDS, version=version) for version in (3, 4)]
    at = dict.fromkeys(range(4), 0)
    truth = {id: [] for id in range(4)}  # the version of each token
    results = {}
    for request in asked:
        engines[0].submit(request)
    while len(results) < 4:
        for engine in engines:
            before = {id: progress.tokens.size for id, progress in engine.progress(at).items()}
            finished = {result.id: result for result in engine.step(0.0)}
            after = engine.progress(at) | finished
            for id, progress in after.items():
                truth[id] += [engine.version] * (progress.tokens.size - before.get(id, 0))
            results |= finished
        moved = data.draw(st.sets(st.sampled_from(sorted(at.keys() - results.keys()) or [0])))
        for id in moved - results.keys():
            progress = engines[at[id]].progress([id]).get(id)
            engines[at[id]].cancel([id])
            at[id] = 1 - at[id]
            engines[at[id]].submit(replace(asked[id], prefix=progress))
    for id, got in results.items():
        assert_same(
            replace(got, versions=whole[id].versions, digests=whole[id].digests, ends=whole[id].ends), whole[id]
        )
        assert np.repeat(got.versions, np.diff(got.ends, prepend=0)).tolist() == truth[id]
        assert (np.diff(got.versions) != 0).all()


def test_a_cancelled_request_with_a_prefix_gives_no_result():
    engine = engine_of(tiny("qwen2"), slots=1)
    whole = drain(engine, [ask(1)])[1]
    for id in (1, 2):
        engine.submit(replace(ask(id), prefix=cut(whole, 5)))
    engine.step(0.0)
    engine.cancel([1, 2])
    assert engine.load_status().running == engine.load_status().waiting == 0
    assert engine.step(0.0) == [] and engine.progress([1, 2]) == {}


def test_the_longest_possible_request_has_a_prefix_of_all_but_one_token():
    whole = drain(engine_of(tiny("gpt2")), [ask(1, prompt=200, tokens=56)])[1]
    request = replace(ask(1, prompt=200, tokens=56), prefix=cut(whole, 55))
    assert_same(drain(engine_of(tiny("gpt2")), [request])[1], whole)


def beginning(tokens=(5, 6, 7), **changes):
    size = len(tokens)
    fields = dict(
        tokens=np.array(tokens, np.int32), logprobs=-np.ones(size, np.float32), versions=np.array([0], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([size], np.int32),
    )  # fmt: skip
    return SampledTokens(**fields | changes)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(ask(1, prompt=250, tokens=7), prefix=beginning()), "250 prompt tokens and up to 7 more exceed"),
        (replace(ask(1), prefix=beginning((5, 32))), r"token ids must be in \[0, 31\], got \d+ to 32"),
        (replace(ask(1), prefix=beginning((5, -1))), r"token ids must be in \[0, 31\], got -1 to"),
        (
            replace(ask(1), prefix=beginning((5, 3))),
            "^request 1: the prefix ends with end token 3; give all actors the same model folder$",
        ),
    ],
)
def test_an_invalid_request_with_a_prefix_is_refused(request_, message):
    engine = engine_of(tiny("qwen2"), end_ids=ENDS)
    with pytest.raises(EngineError, match=message):
        engine.submit(request_)
    assert engine.load_status().waiting == 0


@pytest.mark.parametrize(
    ("prefix", "k", "message"),
    [
        (beginning(()), 0, "prefix of 0 of 12"),
        (beginning(range(5, 17)), 0, "prefix of 12 of 12"),
        (beginning(logprobs=-np.ones(2, np.float32)), 0, "2 logprobs of 3 tokens"),
        (beginning(ends=np.array([2], np.int32)), 0, "spans"),
        (beginning(ends=np.array([3, 3], np.int32), versions=np.array([0, 1], np.int32),
        digests=np.zeros(2, np.int64)), 0, "spans"),
        (beginning(ends=np.array([1, 3], np.int32)), 0, "spans"),
        (beginning(), 2, "0, 0. likeliest tokens, 2 at 3 positions"),
        (beginning(top_tokens=np.ones(6, np.int32), top_logprobs=-np.ones(6, np.float32)), 0, "6, 6. likeliest"),
        (beginning(top_tokens=np.ones(6, np.int32), top_logprobs=-np.ones(3, np.float32)), 2, "6, 3. likeliest"),
    ],
)  # fmt: skip
def test_a_prefix_that_cannot_be_continued_is_a_bug_of_the_caller(prefix, k, message):
    engine = engine_of(tiny("qwen2"), end_ids=ENDS)
    with pytest.raises(AssertionError, match=message):
        engine.submit(replace(ask(1, k=k), prefix=prefix))

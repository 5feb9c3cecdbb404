"""Episodes of several turns: the tokens of a group, and the loop with a real environment and a scripted engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from rollout_support import TOKENIZER, ScriptedEngine, generated, scored
from rollout_support import lease as single_turn

from sgpo_async.config.schema import Tasks
from sgpo_async.engines.base import Generate, Generated, SampledTokens, Score
from sgpo_async.hub.rollout_checks import Limits, report_violation, violation
from sgpo_async.hub.served_weights import ServedWeights
from sgpo_async.rollout import partial
from sgpo_async.rollout.group import RolloutGroup, group_of
from sgpo_async.rollout.partial import Arrived
from sgpo_async.rollout.sampler import RolloutSampler, Sampled
from sgpo_async.wire.records import OBSERVED, Lease, PartialRollout, Progress

DEADLINE_S = 120.0
SERVED = ServedWeights(published={(version, 0): None for version in range(10)})
LIMITS = Limits(vocabulary=300, newest=9, objection=SERVED.objection)


def lease(**changes: object) -> Lease:
    """An episode of up to 4 turns and 20 tokens, guided, so that it is scored if it is correct."""
    base = single_turn(7, autonomous=0, guided=1)
    settings = {"verifier": "own_environment:Guess", "answer": "5", "turns": 4, "max_new_tokens": 20}
    return replace(base, **settings | changes)  # type: ignore[arg-type]


def group(**changes: object) -> RolloutGroup:
    return group_of(lease(**changes), prompt=lambda problem, strategy: [1, 2] + [3] * (strategy is not None))


def text(tokens: np.ndarray) -> str:
    return "".join(map(chr, tokens))


def after(request: Generate, completion: str, *, version: int = 0, end: str = ".") -> Generated:
    """What an engine returns for `request`, if the next completion is this, with this end token."""
    new = generated(request.id, completion + end)  # type: ignore[arg-type]
    if request.prefix is None:
        return replace(new, versions=np.array([version], np.int32), digests=np.zeros(1, np.int64))
    one = request.prefix
    length = len(one.tokens)
    return Generated(
        id=request.id,
        tokens=np.concatenate((one.tokens, new.tokens)),
        logprobs=np.concatenate((one.logprobs, new.logprobs)),
        versions=np.append(one.versions, np.int32(version)),
        digests=np.append(one.digests, np.int64(0)),
        ends=np.append(one.ends, new.ends + np.int32(length)),
        finish="stop",
    )


def unfinished(result: Generated) -> SampledTokens:
    """What an engine reports of a completion that it still samples."""
    return SampledTokens(**{field.name: getattr(result, field.name) for field in fields(SampledTokens)})


def reply(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], np.int32)


def test_in_a_truncated_episode_nothing_is_kept_beside_a_reply() -> None:
    limits = {"top_p": 0.9, "top_k": 8}
    one = group(**limits)
    (request,) = one.requests()
    assert isinstance(request, Generate) and request.report_kept
    one.generated(replace(after(request, "3"), kept=ids(9), kept_sizes=ids(1, 0)))
    second = one.replied(request.id, reply("low"))
    assert second is not None and second.prefix is not None and second.prefix.kept_sizes is not None
    assert second.prefix.kept_sizes.tolist() == [1, 0, 0, 0, 0]
    one.generated(replace(after(second, "5"), kept=ids(9, 7), kept_sizes=ids(1, 0, 0, 0, 0, 0, 1)))
    one.judged(request.id, reward=1.0)
    rollout = one.scored(scored(request.id, *[-1.0] * 7))  # type: ignore[arg-type]
    assert rollout.kept is not None and rollout.kept.tolist() == [9, 7]
    assert violation(lease(**limits), rollout, LIMITS, prompt=None) is None


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_an_episode_is_one_sequence_with_observed_spans() -> None:
    one = group()
    (request,) = one.requests()
    assert isinstance(request, Generate)
    one.generated(after(request, "3"))
    second = one.replied(request.id, reply("low"))
    assert second is not None and second.prefix is not None
    assert text(second.prefix.tokens) == "3.low"
    assert second.prefix.versions.tolist() == [0, OBSERVED]
    assert second.prefix.logprobs.tolist() == [-1, -1, 0, 0, 0]
    assert (second.max_new_tokens, second.seed) == (20, request.seed)
    one.generated(after(second, "5", version=1))
    assert [text(turn) for turn in one.turns(request.id)] == ["3.", "5."]
    score = one.judged(request.id, reward=1.0)
    assert isinstance(score, Score) and text(score.tokens) == "3.low5."
    rollout = one.scored(scored(request.id, -1, -2, -50, -50, -50, -4, -8))  # type: ignore[arg-type]
    assert rollout.unguided_logprob == -15, "replies of the environment do not count"
    assert rollout.sampled.tolist() == [True, True, False, False, False, True, True]
    assert rollout.oldest_version == 0
    assert violation(lease(), rollout, LIMITS, prompt=None) is None
    assert violation(replace(lease(), turns=0), rollout, LIMITS, prompt=None) is not None, "there is no environment"


def test_neighbouring_spans_of_one_completion_are_one_turn() -> None:
    """New weights arrived while the policy wrote it."""
    one = group()
    (request,) = one.requests()
    assert isinstance(request, Generate)
    whole = replace(
        after(request, "31"),
        versions=np.array([0, 1], np.int32),
        digests=np.zeros(2, np.int64),
        ends=np.array([1, 3], np.int32),
    )
    one.generated(whole)
    assert [text(turn) for turn in one.turns(request.id)] == ["31."]


@pytest.mark.parametrize(("changes", "goes_on"), [({}, True), ({"turns": 1}, False), ({"max_new_tokens": 5}, False)])
def test_an_episode_ends_when_its_turns_or_tokens_are_used_up(changes: dict[str, object], goes_on: bool) -> None:
    one = group(**changes)
    (request,) = one.requests()
    assert isinstance(request, Generate)
    one.generated(after(request, "3"))
    assert (one.replied(request.id, reply("low")) is not None) == goes_on


@pytest.mark.parametrize("at", ["while the environment replies", "in the second turn"])
def test_another_actor_continues_an_episode(at: str) -> None:
    first = group()
    (request,) = first.requests()
    assert isinstance(request, Generate)
    arrived = Arrived(size=1)

    def report(running: dict[object, object]) -> None:
        progress = first.progress(running)  # type: ignore[arg-type]
        assert progress is not None and report_violation(lease(), progress, LIMITS, arrived=arrived) is None
        assert all(arrived.report(part) for part in progress.partial)

    first.generated(after(request, "3"))
    report({})
    if at == "in the second turn":
        second = first.replied(request.id, reply("low"))
        assert second is not None
        report({request.id: unfinished(after(second, "4", end=""))})
    moved = group_of(replace(lease(), attempt=1, partial=arrived.partial()), prompt=lambda *_: [1, 2])
    (continued,) = moved.requests()
    if at == "in the second turn":
        assert isinstance(continued, Generate) and continued.prefix is not None
        assert text(continued.prefix.tokens) == "3.low4"
        assert continued.prefix.versions.tolist() == [0, OBSERVED, 0]
    else:
        assert isinstance(continued, Generated), "only the reply is missing"
        moved.generated(continued)
        assert [text(turn) for turn in moved.turns(continued.id)] == ["3."]


def test_an_environment_cannot_write_the_first_token_or_give_it_a_probability() -> None:
    one = group()
    (request,) = one.requests()
    assert isinstance(request, Generate)
    one.generated(after(request, "3"))
    second = one.replied(request.id, reply("low"))
    assert second is not None
    one.generated(after(second, "9"))
    rollout = one.judged(request.id, reward=0.0)
    assert not isinstance(rollout, Score)
    assert violation(lease(), rollout, LIMITS, prompt=None) is None
    nonzero = replace(rollout, logprobs=np.full(len(rollout.tokens), -1.0, np.float32))
    assert violation(lease(), nonzero, LIMITS, prompt=None) == "logprobs of tokens that an environment wrote must be 0"
    ended = replace(
        rollout,
        versions=np.array([0, 0, OBSERVED], np.int32),
        digests=np.zeros(3, np.int64),
        logprobs=np.zeros(7, np.float32),
    )
    assert violation(lease(), ended, LIMITS, prompt=None) == "tokens must end with one that the policy sampled"
    assert violation(lease(turns=1), rollout, LIMITS, prompt=None) == "number of turns is not in [1, turns]"
    assert violation(lease(turns=2), rollout, LIMITS, prompt=None) is None
    begun = replace(rollout, versions=np.array([OBSERVED, 0, 0], np.int32), digests=np.zeros(3, np.int64))
    assert violation(lease(), begun, LIMITS, prompt=None) == "tokens must begin with one that the policy sampled"


def test_a_report_cannot_begin_with_a_reply_or_give_it_a_probability() -> None:
    """The next actor would continue it, and be blamed for it."""
    one = group()
    (request,) = one.requests()
    assert isinstance(request, Generate)
    one.generated(after(request, "3"))
    second = one.replied(request.id, reply("low"))
    assert second is not None
    progress = one.progress({request.id: unfinished(after(second, "4", end=""))})
    assert progress is not None and report_violation(lease(), progress, LIMITS, arrived=Arrived(size=1)) is None
    (part,) = progress.partial
    for changes in ({"versions": np.array([OBSERVED, 0, 0], np.int32)}, {"logprobs": part.logprobs - 1}):
        wrong = replace(progress, partial=(replace(part, **changes),))
        assert report_violation(lease(), wrong, LIMITS, arrived=Arrived(size=1)) is not None


# ---- the loop, with a real environment in a worker process


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def sampler(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutSampler]:
    monkeypatch.chdir(Path(__file__).parent)
    tasks = Tasks(environment="own_environment:Guess", max_turns=4)
    sampler = RolloutSampler(engine, TOKENIZER, tasks)  # type: ignore[arg-type]
    yield sampler
    sampler.close()


def step_until(sampler: RolloutSampler, engine: ScriptedEngine, requests: int) -> list[Sampled]:
    """Step until the engine has got so many requests, or a rollout is finished."""
    deadline = time.monotonic() + DEADLINE_S
    finished: list[Sampled] = []
    while len(engine.submitted) < requests and not finished:
        assert time.monotonic() < deadline
        finished += [outcome for outcome in sampler.step(0.0, 0.1) if isinstance(outcome, Sampled)]
    return finished


@pytest.mark.process
def test_the_loop_plays_an_episode_to_its_end(engine: ScriptedEngine, sampler: RolloutSampler) -> None:
    sampler.add(replace(lease(), autonomous=1, guided=0))
    for number, completion in enumerate(["3", "9", "5"], start=1):
        engine.answers = [after(engine.submitted[-1], completion, end="")]
        finished = step_until(sampler, engine, number + 1)
    (done,) = finished
    assert done.text == "3low9high5"
    assert done.rollout.reward == pytest.approx(0.8)
    assert done.rollout.versions.tolist() == [0, OBSERVED, 0, OBSERVED, 0]
    assert done.last and sampler.leases == []


def test_a_report_that_is_complete_cannot_end_with_a_reply() -> None:
    """The next actor would have it judged, and be blamed for the rollout."""
    part = episode_of(TURNS[:2])
    assert report_reason(part) is None
    assert report_reason(replace(part, finish="stop")) == "report: tokens must end with one that the policy sampled"


@pytest.mark.parametrize("reports", [1, 2], ids=["in one report", "in two reports"])
def test_a_report_cannot_have_more_turns_than_the_lease_allows(reports: int) -> None:
    whole = episode_of(TURNS)
    arrived, part = Arrived(size=1), whole
    if reports == 2:
        assert arrived.report(episode_of(TURNS[:2]))
        rest = partial.after(whole, len(episode_of(TURNS[:2]).tokens))
        assert rest is not None
        part = rest
    assert report_reason(part, turns=3, arrived=arrived) is None
    assert report_reason(part, turns=2, arrived=arrived) == "report: number of turns is not in [1, turns]"


def test_a_slot_comes_only_once_in_a_report() -> None:
    part = episode_of(TURNS[:1])
    assert report_reason(part, replace(part, start=1)) == "report: a slot must come only once"


TURNS = (0, OBSERVED, 0, OBSERVED)  # a turn and its reply, twice


def episode_of(versions: tuple[int, ...]) -> PartialRollout:
    """An episode with these spans, of two tokens each."""
    count = 2 * len(versions)
    return PartialRollout(
        slot=0, start=0, tokens=np.full(count, 65, np.int32),
        logprobs=np.repeat([0.0 if version == OBSERVED else -1.0 for version in versions], 2).astype(np.float32),
        versions=np.array(versions, np.int32), digests=np.zeros(len(versions), np.int64),
        ends=np.arange(2, count + 1, 2, dtype=np.int32),
    )  # fmt: skip


def report_reason(*parts: PartialRollout, turns: int = 4, arrived: Arrived | None = None) -> str | None:
    progress = Progress(task=7, attempt=0, purpose="train", partial=parts)
    return report_violation(lease(turns=turns), progress, LIMITS, arrived=arrived or Arrived(size=1))

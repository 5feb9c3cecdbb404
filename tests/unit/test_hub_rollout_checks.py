"""What the hub refuses of an actor: one test for each thing that a lease allows or a distribution can hold."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.hub.rollout_checks import LOWEST, MOST_KEPT, TOLERANCE, Limits, report_violation, violation
from sgpo_async.hub.served_weights import ServedWeights
from sgpo_async.rollout.partial import Arrived
from sgpo_async.wire.records import OBSERVED, Lease, PartialRollout, Progress, Rollout

VOCABULARY = 50
NEWEST = 9


def i4(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def f4(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {"task": 1, "attempt": 0, "purpose": "train", "problem": "p", "answer": "a"}
    fields |= {"verifier": "math", "strategy": "s", "autonomous": 2, "guided": 2, "min_version": 3, "seed": 0}
    fields |= {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "top_logprobs_num": 2, "unguided_scores": True}
    return Lease(**fields | changes)


def limits(vocabulary: int) -> Limits:
    """Every version was published with the digest 0, as that of every rollout here."""
    served = ServedWeights(published={(version, 0): None for version in range(NEWEST + 1)})
    return Limits(vocabulary, NEWEST, served.objection)


def rollout(**changes: Any) -> Rollout:
    """An autonomous one of three tokens, or with guided=True a correct guided one."""
    fields: dict[str, Any] = {"task": 1, "attempt": 0, "slot": 1, "purpose": "train", "guided": False}
    fields |= {"prompt": i4(1, 2), "tokens": i4(3, 4, 49), "logprobs": f4(-1, 0, -3), "versions": i4(3, 9)}
    fields["digests"] = np.zeros(len(changes.get("versions", fields["versions"])), np.int64)
    fields |= {"ends": i4(1, 3), "reward": 1.0, "finish": "stop"}
    if changes.get("guided"):
        fields |= {"slot": 2, "unguided_logprob": -7.5, "top_tokens": i4(*range(6)), "top_logprobs": f4(*[-1] * 6)}
    return Rollout(**fields | changes)


def why(rollout: Rollout, *, vocabulary: int = VOCABULARY, **changes: Any) -> str | None:
    return violation(lease(**changes), rollout, limits(vocabulary), prompt=None)


def test_valid_rollouts_have_no_violation() -> None:
    assert why(rollout()) is why(rollout(guided=True)) is None
    evaluation = {"purpose": "evaluate", "top_logprobs_num": 0}
    unscored = {"unguided_logprob": None, "top_tokens": None, "top_logprobs": None}
    assert why(rollout(guided=True, purpose="evaluate", **unscored), **evaluation) is None
    assert why(rollout(guided=True, reward=0.0, **unscored)) is None
    assert why(rollout(guided=True, unguided_logprob=None), unguided_scores=False) is None


def test_a_score_that_the_lease_does_not_ask_for_is_a_violation() -> None:
    reason = why(rollout(guided=True), unguided_scores=False)
    assert reason and reason.startswith("unguided_logprob must come with a correct, complete guided rollout")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slot": 4}, "slot is out of range"),
        ({"slot": -1}, "slot is out of range"),
        ({"slot": 2}, "guided flag does not match the slot"),
        ({"guided": True, "slot": 1}, "guided flag does not match the slot"),
        ({"tokens": i4(*range(5)), "logprobs": f4(*[-1] * 5), "ends": i4(1, 5)}, "number of tokens is not in"),
        ({"tokens": i4(), "logprobs": f4(), "ends": i4()}, "number of tokens is not in"),
        ({"finish": "length"}, "finish is length before max_new_tokens"),
        ({"ends": i4(), "versions": i4()}, "ends of spans do not increase"),
        ({"ends": i4(0, 3)}, "ends of spans do not increase"),
        ({"ends": i4(3, 3)}, "ends of spans do not increase"),
        ({"ends": i4(4, 3)}, "ends of spans do not increase"),
        ({"ends": i4(-1, 3)}, "ends of spans do not increase"),
        ({"ends": i4(1, 2)}, "ends of spans do not increase"),
        ({"ends": i4(2**31 - 1, -(2**31))}, "ends of spans do not increase"),
        ({"versions": i4(2, 9)}, "tokens are older than the lease's min_version"),
        ({"versions": i4(3, 10)}, "tokens have a version that does not exist yet"),
        ({"prompt": i4(1, 50)}, "prompt has an id that is not in the vocabulary"),
        ({"prompt": i4(-1, 2)}, "prompt has an id that is not in the vocabulary"),
        ({"prompt": i4()}, "prompt is empty"),
        ({"tokens": i4(3, 50, 4)}, "tokens has an id that is not in the vocabulary"),
        ({"tokens": i4(3, -1, 4)}, "tokens has an id that is not in the vocabulary"),
        ({"guided": True, "top_tokens": i4(0, 1, 2, 3, 4, 50)}, "top_tokens has an id that is not in the vocabulary"),
        ({"guided": True, "top_tokens": i4(0, 1, 2, 3, 4, -1)}, "top_tokens has an id that is not in the vocabulary"),
        ({"logprobs": f4(-1, np.nan, -1)}, "logprobs must be in"),
        ({"logprobs": f4(-1, -np.inf, -1)}, "logprobs must be in"),
        ({"logprobs": f4(-1, np.inf, -1)}, "logprobs must be in"),
        ({"logprobs": f4(-1, 2 * TOLERANCE, -1)}, "logprobs must be in"),
        ({"logprobs": f4(-1, -1e9, -1)}, "logprobs must be in"),
        ({"reward": float("nan")}, "reward must be finite"),
        ({"reward": float("inf")}, "reward must be finite"),
        ({"reward": -float("inf")}, "reward must be finite"),
        ({"solved_at": 0.5}, "solved_at differs from the lease's"),
        ({"unguided_logprob": -1.0}, "unguided_logprob must come with a correct, complete guided rollout"),
        (
            {"guided": True, "unguided_logprob": None},
            "unguided_logprob must come with a correct, complete guided rollout",
        ),
        ({"guided": True, "reward": 0.5}, "unguided_logprob must come with a correct, complete guided rollout"),
        ({"guided": True, "unguided_logprob": 1e30}, "unguided_logprob must be finite and <= 0"),
        ({"guided": True, "unguided_logprob": 0.01}, "unguided_logprob must be finite and <= 0"),
        ({"guided": True, "unguided_logprob": float("nan")}, "unguided_logprob must be finite and <= 0"),
        ({"guided": True, "unguided_logprob": -float("inf")}, "unguided_logprob must be finite and <= 0"),
        ({"guided": True, "top_tokens": i4(1, 2, 3), "top_logprobs": f4(-1, -1, -1)}, "top_tokens and top_logprobs"),
        ({"guided": True, "top_tokens": None, "top_logprobs": None}, "top_tokens and top_logprobs must hold"),
        ({"top_tokens": i4(*range(6)), "top_logprobs": f4(*[-1] * 6)}, "top_tokens and top_logprobs must hold"),
        ({"guided": True, "top_logprobs": f4(-1, -1, -1, -1, -1, np.nan)}, "top_logprobs must be in"),
        ({"guided": True, "top_logprobs": f4(-1, -1, -1, -1, -1, 1)}, "top_logprobs must be in"),
    ],
)
def test_what_a_lease_does_not_allow_is_a_violation(changes: dict[str, Any], reason: str) -> None:
    assert (why(rollout(**changes)) or "").startswith(reason)


TRUNCATED = {"top_p": 0.9, "top_k": 8}
KEPT = {"kept": i4(9, 8, 3), "kept_sizes": i4(2, 0, 1)}  # of the tokens 3, 4 and 49


def test_a_truncated_rollout_has_its_kept_tokens() -> None:
    assert why(rollout(**KEPT), **TRUNCATED) is why(rollout(guided=True, **KEPT), **TRUNCATED) is None
    alone = {"kept": i4(), "kept_sizes": i4(0, 0, 0)}
    assert why(rollout(**alone), **TRUNCATED) is why(rollout(**KEPT), top_k=8) is None
    evaluation = {"purpose": "evaluate", "top_logprobs_num": 0}
    assert why(rollout(purpose="evaluate"), **evaluation | TRUNCATED) is None


@pytest.mark.parametrize(
    ("changes", "lease", "reason"),
    [
        ({}, TRUNCATED, "kept must come with rollouts of training with top_p below 1"),
        (KEPT, {}, "kept must come with rollouts of training with top_p below 1"),
        (KEPT | {"kept": i4(9, 50, 3)}, TRUNCATED, "kept has an id that is not in the vocabulary"),
        (KEPT | {"kept": i4(9, -1, 3)}, TRUNCATED, "kept has an id that is not in the vocabulary"),
        (KEPT | {"kept": i4(9, 9, 3)}, TRUNCATED, "kept must hold distinct tokens at each position"),
        (KEPT | {"kept": i4(9, 3, 3)}, TRUNCATED, "kept must hold distinct tokens at each position"),
        (KEPT | {"kept": i4(9, 8, 49)}, TRUNCATED, "kept must hold distinct tokens at each position"),
    ],
)
def test_kept_tokens_that_a_lease_does_not_allow_are_a_violation(
    changes: dict[str, Any], lease: dict[str, Any], reason: str
) -> None:
    assert (why(rollout(**changes), **lease) or "").startswith(reason)


def test_the_number_of_kept_tokens_at_a_position_is_limited() -> None:
    """The learner pads the positions of a chunk to the largest."""
    for size, reason in ((MOST_KEPT - 1, None), (MOST_KEPT, f"kept_sizes must be < {MOST_KEPT}")):
        many = rollout(kept=np.arange(100, 100 + size, dtype=np.int32), kept_sizes=i4(0, size, 0))
        assert why(many, vocabulary=10_000, **TRUNCATED) == reason


def test_kept_tokens_are_checked_in_reports_and_where_an_environment_wrote() -> None:
    part = PartialRollout(
        slot=1, start=0, tokens=i4(3, 4, 5), logprobs=f4(-1, 0, 0), versions=i4(3, OBSERVED),
        digests=np.zeros(2, np.int64), ends=i4(1, 3),
        kept=i4(9), kept_sizes=i4(1, 0, 0),
    )  # fmt: skip

    def reason(part: PartialRollout, **changes: Any) -> str | None:
        progress = Progress(task=1, attempt=0, purpose="train", partial=(part,))
        return report_violation(lease(turns=2, **changes), progress, limits(VOCABULARY), arrived=Arrived(size=4))

    assert reason(part, **TRUNCATED) is None
    assert (reason(part) or "").startswith("report: kept must come with")
    assert reason(replace(part, kept=None, kept_sizes=None)) is None
    written = replace(part, kept_sizes=i4(0, 1, 0))
    assert reason(written, **TRUNCATED) == "report: kept_sizes of tokens that an environment wrote must be 0"


def test_rounding_is_no_violation() -> None:
    assert why(rollout(logprobs=f4(TOLERANCE / 2, -1, LOWEST))) is None
    assert why(rollout(guided=True, unguided_logprob=2 * TOLERANCE)) is None, "a sum of three tokens"


def test_an_unknown_vocabulary_allows_every_id_but_a_negative_one() -> None:
    assert why(rollout(tokens=i4(3, 2**31 - 1, 4)), vocabulary=0) is None
    assert why(rollout(tokens=i4(3, -1, 4)), vocabulary=0)


def test_an_evaluation_has_no_scores() -> None:
    evaluation = {"purpose": "evaluate", "top_logprobs_num": 0}
    assert (why(rollout(guided=True, purpose="evaluate"), **evaluation) or "").startswith("unguided_logprob must come")


def test_a_completion_may_end_by_its_length_only_at_its_limit() -> None:
    assert why(rollout(finish="length"), max_new_tokens=3) is None
    assert why(rollout(finish="stop"), max_new_tokens=3) is None


def test_the_rollouts_of_a_group_have_one_prompt_for_each_kind() -> None:
    def verdict(known: np.ndarray | None, **changes: Any) -> str | None:
        return violation(lease(), rollout(**changes), limits(VOCABULARY), prompt=known)

    differs = "prompt differs from that of the group"
    assert verdict(None) is verdict(i4(1, 2)) is None
    assert verdict(i4(7), guided=True, prompt=i4(7)) is None
    for other in (i4(1), i4(1, 3), i4(1, 2, 3)):
        assert verdict(other) == differs
        assert verdict(other, guided=True) == differs


def test_a_group_knows_the_prompt_of_each_kind() -> None:
    group = Arrived(size=16)
    assert group.prompt(guided=False) is group.prompt(guided=True) is None
    group.finish(rollout(slot=0, prompt=i4()))  # of an evaluation, whose tokens are not kept
    group.finish(rollout(slot=1, prompt=i4(1, 2)))
    assert group.prompt(guided=False).tolist() == [1, 2]
    assert group.prompt(guided=True) is None
    group.finish(rollout(slot=9, guided=True, prompt=i4(7)))
    assert (group.prompt(guided=False).tolist(), group.prompt(guided=True).tolist()) == ([1, 2], [7])


@st.composite
def leases_with_rollouts(draw: st.DrawFn) -> tuple[Lease, Rollout, int]:
    """A lease, a rollout as an actor makes it (see `sgpo_async.rollout.group`), and the vocabulary; 0: unknown."""
    vocabulary = draw(st.integers(1, 2**31 - 1))
    sizes = draw(st.tuples(st.integers(1, 4), st.integers(0, 4)))
    purpose, k, oldest = draw(st.sampled_from(("train", "evaluate"))), draw(st.integers(0, 3)), draw(st.integers(0, 8))
    spans = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    length, slot = sum(spans), draw(st.integers(0, sum(sizes) - 1))
    guided, reward = slot >= sizes[0], draw(st.sampled_from((0.0, 1.0)))
    finish = draw(st.sampled_from(("stop", "length")))
    distilled = guided and purpose == "train" and reward == 1.0 and finish == "stop"
    scored = draw(st.booleans())
    top = length * k if distilled else 0

    def ids(count: int) -> np.ndarray:
        return i4(*draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count)))

    def logprobs(count: int) -> np.ndarray:
        return f4(*draw(st.lists(st.floats(LOWEST, 0, width=32), min_size=count, max_size=count)))

    asked = lease(
        purpose=purpose, autonomous=sizes[0], guided=sizes[1], min_version=oldest, top_logprobs_num=k,
        unguided_scores=scored,
        max_new_tokens=length + (0 if finish == "length" else draw(st.integers(0, 5))),
    )  # fmt: skip
    versions = st.lists(st.integers(oldest, NEWEST), min_size=len(spans), max_size=len(spans))
    made = Rollout(
        task=asked.task, attempt=asked.attempt, slot=slot, purpose=purpose, guided=guided,
        prompt=ids(draw(st.integers(1, 5))), tokens=ids(length), logprobs=logprobs(length),
        versions=i4(*draw(versions)),
        digests=np.zeros(len(spans), np.int64), ends=np.cumsum(spans, dtype=np.int32), reward=reward, finish=finish,
        unguided_logprob=draw(st.floats(-1e6, 0)) if scored and distilled else None,
        top_tokens=ids(top) if top else None, top_logprobs=logprobs(top) if top else None,
    )  # fmt: skip
    return asked, made, draw(st.sampled_from((0, vocabulary)))


@settings(max_examples=200, deadline=None)
@given(leases_with_rollouts())
def test_what_an_actor_makes_is_never_a_violation(made: tuple[Lease, Rollout, int]) -> None:
    lease, rollout, vocabulary = made
    for seen in (None, rollout.prompt):
        assert violation(lease, rollout, limits(vocabulary), prompt=seen) is None


@settings(max_examples=300, deadline=None)
@given(leases_with_rollouts(), st.data())
def test_any_numbers_in_a_rollout_give_a_verdict(made: tuple[Lease, Rollout, int], data: st.DataObject) -> None:
    """No error, and no warning of NumPy, whatever the numbers are: the hub's loop does not survive one."""
    lease, rollout, vocabulary = made
    name = data.draw(
        st.sampled_from(["prompt", "tokens", "versions", "ends", "logprobs", "reward", "unguided_logprob"])
    )
    now = getattr(rollout, name)
    if isinstance(now, np.ndarray):
        bits = data.draw(st.binary(min_size=now.nbytes, max_size=now.nbytes))
        changed: Any = np.frombuffer(bits, now.dtype)
    else:
        changed = data.draw(st.floats())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hostile = replace(rollout, **{name: changed})
        verdict = violation(lease, hostile, limits(vocabulary), prompt=None)
    assert verdict is None or isinstance(verdict, str)

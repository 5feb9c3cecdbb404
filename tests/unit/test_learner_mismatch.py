"""The mismatch metrics compared with plain loops, the conditions of the alarm, and a faulty engine that raises it."""

from dataclasses import replace
from typing import Any

import engines_models as models
import numpy as np
import pytest
import torch

from sgpo_async.config.schema import Learner, Model, Run
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.learner.batch import from_shard
from sgpo_async.learner.mismatch import MIN_TOKENS, Alarm, bound_for
from sgpo_async.metrics.mismatch import excess, mismatch_summary
from sgpo_async.wire.records import Rollout
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")

FLOAT32 = bound_for(Run(), learner_bfloat16=False)


def measured(parts: list[list[Rollout]], *, row_tokens: int = 40) -> dict[str, Any]:
    run = cases.settings(row_tokens=row_tokens)
    batch = from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm)
    return cases.stepper(run, cases.tiny_model()).accumulate(batch).reduce()


@pytest.mark.parametrize("row_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_plain_loops(seed: int, row_tokens: int) -> None:
    parts = cases.spread(cases.groups(seed=seed), seed=seed)
    expected = cases.reference_mismatch(cases.tiny_model(), parts)
    assert all(
        expected[f"mismatch_tokens_{cell}"] for cell in ("lag0_first", "lag0_later", "stale_first", "stale_later")
    )
    found = measured(parts, row_tokens=row_tokens)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


def test_metrics_without_tokens_are_none() -> None:
    stale = [
        [
            replace(
                r,
                versions=np.array([4], np.int32),
                digests=np.zeros(1, np.int64),
                ends=np.array([len(r.tokens)], np.int32),
            )
            for r in group
        ]
        for group in cases.groups()
    ]
    found = measured(stale)
    for cell in ("lag0_first", "lag0_later", "stale_later"):
        assert found[f"mismatch_tokens_{cell}"] == 0
        assert [found[f"mismatch_{metric}_{cell}"] for metric in ("mean", "max", "kl")] == [None] * 3
    assert found["mismatch_mean_stale_first"] > 0
    assert found["mismatch_by_lag"].keys() == {"1"}


def test_a_small_difference_is_not_lost_in_rounding() -> None:
    """rho - 1 - log rho is about (log rho)^2 / 2, which is 5e-13 if log rho is 1e-6."""
    model, parts = cases.tiny_model(), cases.groups()

    def near(rollout: Rollout) -> Rollout:
        log_pi = cases.log_probs(model, rollout.prompt, rollout.tokens).detach().numpy()
        logprobs = log_pi[range(len(rollout.tokens)), rollout.tokens] + 1e-6
        return replace(rollout, logprobs=logprobs)  # in float64, so that the difference is exactly 1e-6

    found = measured([[near(r) for r in group] for group in parts])
    assert found["mismatch_mean_lag0_first"] == pytest.approx(1e-6, rel=1e-6)
    assert found["mismatch_kl_lag0_first"] == pytest.approx(5e-13, rel=1e-3)


def line(step: int, **means: tuple[int, float]) -> dict[str, Any]:
    """The metrics of one step, given (tokens, mean) for each span."""
    found: dict[str, Any] = {"step": step}
    for span in ("first", "later"):
        tokens, mean = means.get(span, (0, None))
        found |= {f"mismatch_tokens_lag0_{span}": tokens, f"mismatch_mean_lag0_{span}": mean}
        found |= {f"mismatch_max_lag0_{span}": None if mean is None else 2 * mean}
    return found | {"mismatch_mean_stale_first": 9.0, "mismatch_mean_stale_later": 9.0}


def judged(alarm: Alarm, measured: dict[str, Any]) -> dict[str, Any]:
    return measured | alarm.judge(measured)


def test_a_mean_above_the_bound_is_an_alarm_and_a_mean_at_the_bound_is_not() -> None:
    alarm = Alarm(0.01)
    assert excess(judged(alarm, line(1, first=(MIN_TOKENS, 0.01), later=(MIN_TOKENS, 0.001)))) is None
    found = excess(judged(alarm, line(2, first=(MIN_TOKENS, 0.011), later=(MIN_TOKENS, 0.2))))
    assert found is not None
    assert (found.step, found.span, found.mean, found.bound) == (2, "later", pytest.approx(0.2), 0.01)
    assert found.text.startswith("step 2: ") and "0.2 nats" in found.text and "learner.mismatch_bound" in found.text
    assert "\n" not in found.text


def test_stale_tokens_raise_no_alarm() -> None:
    found = judged(Alarm(0.01), line(1))
    assert found["mismatch_judged_first"] is found["mismatch_judged_later"] is None
    assert excess(found) is None


def test_too_few_tokens_are_accumulated_over_steps() -> None:
    alarm, few = Alarm(0.01), MIN_TOKENS // 2
    assert excess(judged(alarm, line(1, later=(few, 0.5)))) is None
    assert excess(judged(alarm, line(2, first=(MIN_TOKENS, 0.0)))) is None
    found = judged(alarm, line(3, later=(3 * few, 0.1)))
    assert found["mismatch_judged_later"] == pytest.approx((0.5 + 3 * 0.1) / 4)
    assert excess(found)
    next_step = judged(alarm, line(4, later=(few, 0.5)))
    assert next_step["mismatch_judged_later"] is None  # the accumulation starts again after each judgement


@pytest.mark.parametrize(
    ("bound", "dtype", "learner_bfloat16", "expected"),
    [
        (0.0, "float32", False, 1e-4),
        (0.0, "float32", True, 0.05),
        (0.0, "bfloat16", False, 0.05),
        (0.3, "bfloat16", True, 0.3),
        (float("inf"), "float32", False, float("inf")),
    ],
)
def test_the_bound_depends_on_the_precision(bound: float, dtype: Any, learner_bfloat16: bool, expected: float) -> None:
    run = Run(model=Model(dtype=dtype), learner=Learner(mismatch_bound=bound))
    assert bound_for(run, learner_bfloat16=learner_bfloat16) == expected


def test_an_infinite_bound_raises_no_alarm() -> None:
    found = judged(Alarm(float("inf")), line(1, first=(MIN_TOKENS, 1e9)))
    assert excess(found) is None
    assert excess(found | {"mismatch_bound": None}) is None  # infinity is null in JSON


def test_the_summary_counts_alarms_and_names_the_worst_step() -> None:
    alarm = Alarm(0.01)
    steps = (
        line(1, first=(MIN_TOKENS, 0.001)),
        line(2),
        line(3, first=(MIN_TOKENS, 0.02)),
        line(4, later=(MIN_TOKENS, 0.3), first=(MIN_TOKENS, 0.02)),
    )
    found = mismatch_summary([judged(alarm, step) for step in steps])
    expected = {"judged": 3, "alarms": 2, "worst_step": 4, "worst_span": "later", "bound": 0.01}
    assert found == expected | {"mean": pytest.approx(0.3), "max": pytest.approx(0.6)}
    assert mismatch_summary([{"step": 1, "loss": 0.5}]) == {}
    unjudged = mismatch_summary([judged(Alarm(0.01), line(1))])
    assert (unjudged["judged"], unjudged["alarms"], unjudged["mean"], unjudged["worst_step"]) == (0, 0, None, None)


class KeepsOldKeys(EmbeddedEngine):
    """A faulty engine: after an update it continues sequences with the keys and values of the old weights."""

    def _withdraw(self) -> None:
        for row, sequence in enumerate(self._running.sequences):
            self._running.update(row)
            sequence.close_span(self.version, self.digest)
        self.version = None


@pytest.mark.parametrize(("kind", "faulty"), [(EmbeddedEngine, False), (KeepsOldKeys, True)])
def test_an_engine_that_keeps_old_keys_and_values_raises_the_alarm(kind: type[EmbeddedEngine], faulty: bool) -> None:
    """A real engine gets new weights in the middle of its sequences; then the learner trains on them."""
    stepper = cases.stepper(cases.settings(), cases.tiny_model(dtype=torch.float32))
    stepper.update(cases.shard_of(cases.groups(version=0), problems=4, version=0))
    new = {name: p.full_tensor().detach().clone() for name, p in stepper.policy.model.named_parameters()}
    engine = kind(cases.tiny_model(dtype=torch.float32), digest=models.digest, slots=16, end_ids=())
    load(engine, 0, models.weights(cases.tiny_model(dtype=torch.float32)))
    before = submit(engine, range(16), new_tokens=24)
    early = [result for _ in range(12) for result in engine.step(0.0)]
    load(engine, 1, new)
    after = submit(engine, range(16, 32), new_tokens=24)
    results = {result.id: result for result in (*early, *models.drain(engine).values())}
    parts = [[rollout_of(results[i], prompt) for i, prompt in group] for group in (before, after)]
    metrics = stepper.update(cases.shard_of(parts, problems=2, version=1))
    found = judged(Alarm(FLOAT32), metrics | {"step": 2})
    assert found["mismatch_mean_lag0_first"] < FLOAT32
    assert found["mismatch_tokens_lag0_later"] > MIN_TOKENS
    alarm = excess(found)
    assert (alarm.span if alarm else None) == ("later" if faulty else None)


def load(engine: EmbeddedEngine, version: int, tensors: dict[str, torch.Tensor]) -> None:
    engine.load(Weights(version=version, digest=models.digest(tensors.items()), read=tensors.copy))


def submit(engine: EmbeddedEngine, ids: range, *, new_tokens: int) -> list[tuple[int, np.ndarray]]:
    prompts = models.prompts_of([5] * len(ids), vocabulary=cases.VOCABULARY, seed=ids.start)
    for i, prompt in zip(ids, prompts, strict=True):
        engine.submit(Generate(id=i, prompt=prompt, max_new_tokens=new_tokens, temperature=1.0, seed=i))
    return list(zip(ids, prompts, strict=True))


def rollout_of(result: Generated, prompt: np.ndarray) -> Rollout:
    task, slot = divmod(result.id, 16)  # type: ignore[operator]
    return Rollout(
        task=task,
        attempt=0,
        slot=slot,
        purpose="train",
        guided=False,
        prompt=prompt,
        tokens=result.tokens,
        logprobs=result.logprobs,
        versions=result.versions,
        digests=result.digests,
        ends=result.ends,
        reward=float(slot % 2),
        finish=result.finish,
    )

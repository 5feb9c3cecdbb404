"""The learner's lines about its steps: one a second at most, and all of them at level debug."""

import logging
from typing import Any

import pytest

from sgpo_async.config.schema import OTHERS_KEPT
from sgpo_async.learner import step_log
from sgpo_async.learner.step_log import StepLog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def line(step: int, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "loss": 0.2345, "pass_auto": 0.125, "pass_guided": 1.0, "tokens_per_s": 10_512.0}
    return values | {"lag_mean": 1.5, "lag_max": 2, "eval_pass_auto": None} | changes


def run_steps(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[list[int]]:
    """Log 10 steps of `seconds` each; return the steps with a line at level info, and those at level debug."""
    clock = Clock()
    monkeypatch.setattr(step_log, "time", clock)
    log = StepLog(10)
    with caplog.at_level(logging.DEBUG, logger="sgpo_async"):
        for step in range(1, 11):
            clock.now += seconds
            log.step(line(step, eval_pass_auto=0.1 if step == 5 else None, eval_pass_guided=0.9), seconds=seconds)
    levels = [[r for r in caplog.records if r.levelno == level] for level in (logging.INFO, logging.DEBUG)]
    return [[record.fields["step"] for record in records] for records in levels]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (5.0, list(range(1, 11))),
        (1.0, list(range(1, 11))),
        (0.5, [1, 3, 5, 7, 9, 10]),
        (0.01, [1, 5, 10]),  # the first, the one with an evaluation, the last
    ],
)
def test_fast_steps_have_a_line_a_second_and_the_others_are_at_debug(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seconds: float, shown: list[int]
) -> None:
    info, debug = run_steps(caplog, monkeypatch, seconds)
    assert info == shown
    assert sorted(info + debug) == list(range(1, 11))


def test_a_line_says_what_a_person_asks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sgpo_async"):
        StepLog(120).step(line(3), seconds=0.31)
        StepLog(120).step(line(20, eval_pass_auto=0.015, eval_pass_guided=0.98), seconds=0.31)
        StepLog(120).step({"step": 7, "loss": None}, seconds=2.0)
    first, second, third = (record.getMessage() for record in caplog.records)
    expected = "step 3/120  loss 0.234  pass 12.5 % alone, 100.0 % guided  10.5 k tokens/s  lag 1.50  0.310 s"
    assert first.replace("0.235", "0.234") == expected
    assert "held-out 1.5 %, 98.0 %" in second
    assert "loss –" in third and "pass – alone, – guided" in third


def test_the_values_are_keys_for_programs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sgpo_async"):
        StepLog(120).step(line(3, other={"not": "logged"}), seconds=0.31)
    (record,) = caplog.records
    values = {"event": "step", "step": 3, "steps": 120, "seconds": 0.31, "loss": 0.2345}
    expected = {"pass_auto": 0.125, "pass_guided": 1.0, "tokens_per_s": 10_512.0, "lag_mean": 1.5, "lag_max": 2}
    assert record.fields == values | expected  # type: ignore[attr-defined]


def test_larger_kept_sets_than_the_estimate_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog(10)
    for number, mean in enumerate((None, 1.0 + OTHERS_KEPT, 24.2, 30.0), 1):
        log.step(line(number, kept_mean=mean), seconds=0.1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("rollout.top_p and rollout.top_k keep 24 tokens on average, but the estimate")

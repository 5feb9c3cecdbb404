"""Every rule of advice, on both sides of its threshold, and with too little data."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from synthetic_metrics import synthetic_lines

from sgpo_async.cli.main import COMMANDS
from sgpo_async.config import Run, by_key_path, to_plain
from sgpo_async.report import advisories as rules
from sgpo_async.report.advisories import EARLY, ENOUGH, RECENT, RULES, Facts, advise

SETTINGS = to_plain(Run())
QUIET = {  # a run that needs no advice
    **{"learner_idle": 0.1, "engine_idle": 0.1, "engine_waits": {"weights": 0.02, "leases": 0.08}},
    **{"learner_waits": {"batch": 0.1, "publication": 0.01, "checkpoint": 0.0}, "tokens_dropped": 0.0},
    **{"length_bias": 0.0, "correction_clipped": 0.01, "correction_mean_stale": 1.0, "grad_norm": 1.0},
    **{"entropy": 0.5, "pass_auto": 0.5, "pass_guided": 0.8, "uniform": 0.3, "cut": 0.01},
}


def steps(count: int = RECENT + EARLY, **values: Any) -> list[dict[str, Any]]:
    """Lines of a quiet run, with these values instead in every step."""
    return [{"step": step, **QUIET, **values} for step in range(1, count + 1)]


def with_last(key: str, value: Any) -> list[dict[str, Any]]:
    lines = steps()
    lines[-1][key] = value
    return lines


def serving(version: int) -> dict[str, Any]:
    return {"step": 20, "published": 20, "actors": [{"name": "a", "state": "serving", "version": version}]}


def judged(mean: float) -> dict[str, Any]:
    return {"mismatch_bound": 0.1, "mismatch_judged_first": mean}


# The rule, what is just not enough for it, what is, and words of its evidence and remedy.
CASES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    (
        rules.stalled,
        {"status": {"stalled": ""}},
        {"status": {"stalled": "no actor is connected"}},
        "no actor is connected",
    ),
    (
        rules.wrong_weights,
        {"status": {"canary_alarms": {"stuck": 0}}},
        {"status": {"canary_alarms": {"stuck": 2}}},
        r"do not move with the versions \(2\).*hub\.canary_tolerance \(now 0\.0\)",
    ),
    (rules.mismatched, {"lines": steps(**judged(0.1))}, {"lines": steps(**judged(0.11))}, "learner.mismatch_bound"),
    (
        rules.quarantined,
        {"status": {"quarantined": {}}},
        {"status": {"quarantined": {"a": "3 invalid"}}},
        "a: 3 invalid",
    ),
    (
        rules.rejected,
        {"status": {"rejected": 0}},
        {"status": {"rejected": 1, "last_rejection": "malformed"}},
        "malformed",
    ),
    (rules.restarted, {"status": {"hub_restarts": 0}}, {"status": {"hub_restarts": 1}}, "1"),
    (
        rules.trainer_idle,
        {"lines": steps(learner_idle=0.3)},
        {"lines": steps(learner_idle=0.31)},
        "more actors.*engine.slots",
    ),
    (
        rules.trainer_idle,
        {"lines": steps(learner_idle=0.3, engine_idle=0.9)},
        {"lines": steps(learner_idle=0.31, engine_idle=0.31)},
        r"hub\.max_lag \(now 2\)",
    ),
    (rules.engines_idle, {"lines": steps(engine_idle=0.3)}, {"lines": steps(engine_idle=0.31)}, "problems_per_step"),
    (
        rules.engines_idle,
        {"lines": steps(engine_idle=0.5, learner_idle=0.31)},
        {"lines": steps(engine_idle=0.5)},
        "actors",
    ),
    (
        rules.engines_idle,
        {"lines": steps(engine_idle=0.3, engine_waits={"weights": 0.3})},
        {"lines": steps(engine_idle=0.4, engine_waits={"weights": 0.21})},
        "hub.weight_deltas",
    ),
    (
        rules.storing,
        {"lines": steps(learner_waits={"publication": 0.1, "checkpoint": 0.1})},
        {"lines": steps(learner_waits={"publication": 0.1, "checkpoint": 0.11})},
        "learner.checkpoint_every",
    ),
    (rules.dropped, {"lines": steps(tokens_dropped=0.1)}, {"lines": steps(tokens_dropped=0.11)}, "hub.stale=correct"),
    (rules.dropped, {"lines": steps(length_bias=-0.05)}, {"lines": steps(length_bias=-0.06)}, "6.0 % shorter"),
    (rules.clipped, {"lines": steps(correction_clipped=0.2)}, {"lines": steps(correction_clipped=0.21)}, "hub.max_lag"),
    (rules.spiked, {"lines": with_last("grad_norm", 10.0)}, {"lines": with_last("grad_norm", 10.1)}, "optim.lr"),
    (
        rules.spiked,  # a spike below optim.grad_clip is none
        {"lines": [*steps(grad_norm=0.01), {"step": 99, "grad_norm": 1.0}]},
        {"lines": [*steps(grad_norm=0.01), {"step": 99, "grad_norm": 1.01}]},
        r"optim\.grad_clip \(now 1\.0\)",
    ),
    (
        rules.collapsed,
        {"lines": [*steps(10), *steps(30, entropy=0.021)[10:]]},
        {"lines": [*steps(10), *steps(30, entropy=0.019)[10:]]},
        "rollout.temperature",
    ),
    (
        rules.collapsed,  # certain because nearly everything is solved
        {"lines": [*steps(10), *steps(30, entropy=0.019, pass_auto=0.81)[10:]]},
        {"lines": [*steps(10), *steps(30, entropy=0.019, pass_auto=0.8)[10:]]},
        "0.500 at the beginning",
    ),
    (rules.no_signal, {"lines": steps(pass_auto=0.97)}, {"lines": steps(pass_auto=0.98)}, "harder problems"),
    (
        rules.no_signal,
        {"lines": steps(pass_auto=0.0, pass_guided=0.02)},
        {"lines": steps(pass_auto=0.0, pass_guided=0.01)},
        "a warm-up first: torchrun ",
    ),
    (rules.no_signal, {"lines": steps(uniform=0.9)}, {"lines": steps(uniform=0.91)}, r"rollout\.autonomous \(now 8\)"),
    (
        rules.useless_strategies,
        {"lines": steps(pass_guided=0.52)},
        {"lines": steps(pass_guided=0.5)},
        "strategies check",
    ),
    (
        rules.useless_strategies,  # the policy has learned what they say
        {"lines": steps(pass_auto=0.8, pass_guided=0.7)},
        {"lines": steps(pass_auto=0.79, pass_guided=0.7)},
        "objective=grpo",
    ),
    (rules.cut_rollouts, {"lines": steps(cut=0.1)}, {"lines": steps(cut=0.11)}, "rollout.max_new_tokens"),
    (rules.late_weights, {"status": serving(17)}, {"status": serving(16)}, "version 16 of 20"),
]


def facts(**known: Any) -> Facts:
    return Facts(**{"status": {}, "lines": [], "settings": SETTINGS, **known})


@pytest.mark.parametrize(("rule", "below", "above", "words"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rule_has_two_sides(rule: Any, below: dict[str, Any], above: dict[str, Any], words: str) -> None:
    assert rule(facts(**below)) is None
    found = rule(facts(**above))
    assert found is not None
    assert re.search(words, f"{found.evidence}; {found.remedy}"), found
    assert found in advise(facts(**above))
    assert "\n" not in f"{found.what}{found.evidence}{found.remedy}"


def test_every_rule_is_tested() -> None:
    assert {rule for rule, *_ in CASES} == set(RULES)


def test_a_run_that_goes_well_gets_no_advice() -> None:
    assert advise(facts(lines=steps(), status=serving(20))) == []
    assert advise(facts(lines=synthetic_lines(60), status=serving(20))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_too_little_data_gives_no_advice(rule: Any) -> None:
    """Nothing is known, or only the first steps are, in which processes start, or the settings are not known."""
    assert rule(Facts({}, [], {})) is None
    for own, _, above, _ in CASES:
        if own is rule and "lines" in above and rule is not rules.mismatched:
            assert rule(facts(lines=above["lines"][: EARLY + ENOUGH - 1])) is None
            assert rule(Facts({}, above["lines"], {})) is not None, "values of settings are not needed"


def test_values_that_a_step_lacks_are_left_out() -> None:
    lines = steps(learner_idle=None)
    assert rules.trainer_idle(facts(lines=lines)) is None
    for line in lines[-ENOUGH:]:
        line["learner_idle"] = 0.5
    assert rules.trainer_idle(facts(lines=lines)) is not None


def test_the_worst_comes_first() -> None:
    status = {"stalled": "nothing moves", "hub_restarts": 1}
    found = advise(facts(status=status, lines=steps(pass_auto=0.99)))
    assert [one.severity for one in found] == ["alarm", "warning", "hint"]


def test_every_remedy_names_keys_and_commands_that_exist() -> None:
    keys = dict(by_key_path(SETTINGS))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = set()
    for rule, _, above, _ in CASES:
        remedy = rule(facts(**above)).remedy
        for key in re.findall(r"\b([a-z]+(?:\.[a-z_]+)+)\b", remedy):
            if key.partition(".")[0] in sections and not key.endswith(".py"):
                assert key in keys, key
                named.add(key)
        assert set(re.findall(r"sgpo-async (\w+)", remedy)) <= {*COMMANDS, "and"}, remedy
    assert len(named) >= 15


def test_names_from_outside_stay_in_one_short_printable_line() -> None:
    hostile = "\x1b[31m<script>\n" * 100
    found = advise(
        facts(status={"stalled": hostile, "quarantined": {hostile: hostile}, "rejected": 1, "last_rejection": hostile})
    )
    assert len(found) == 3
    for one in found:
        assert one.evidence.isprintable() and len(one.evidence) < 1500

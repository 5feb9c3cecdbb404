"""Everything that the hub says about a run beyond the figures that every display shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgpo_async.logs import one_line
from sgpo_async.report.closing import ledger_rows
from sgpo_async.report.numbers import NONE, clock, number, percent, scientific

REASON = 400  # characters of a text that a member may have sent
COUNTS = {  # name by key of the status
    "joined": "joined",
    "left": "left",
    "refused": "refused",
    "leases_reissued": "leases given again",
    "leases_moved": "moved",
    "duplicates": "duplicates",
    "rejected": "invalid",
}


def hub_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of each fact; see `hub.status` for the keys."""
    get = status.get
    published = None if get("published") == -1 else get("published")
    evaluating = "none running" if get("evaluating") is None else f"measuring version {get('evaluating')}"
    return [
        ("learner", _learner(get("learner") or {})),
        ("weights", f"version {number(get('version'))}, published {number(published)}"),
        *_served(get("actors") or []),
        ("canary", _canary(status)),
        ("tokens", f"generated {number(get('tokens_generated'))}, trained {number(get('tokens_trained'))}"),
        ("dropped", _dropped(status)),
        ("engines", f"{number(get('running'))} sequences; waited {_engine_waits(get('engine_waits') or {})}"),
        ("no signal", f"{percent(get('uniform'))} of the groups; cut: {percent(get('cut'))} of the rollouts"),
        ("mean reward", f"alone {number(get('reward_auto'))}, guided {number(get('reward_guided'))}"),
        ("mean length", f"alone {number(get('length_auto'))}, guided {number(get('length_guided'))} tokens"),
        ("evaluation", evaluating),
        *_ledger(get("ledger") or {}),
        *(
            (f"evaluation {name}", text.replace("trained", "finished"))
            for name, text in _ledger(get("evaluation_ledger") or {})
        ),
        ("events", ", ".join(f"{number(get(key))} {name}" for key, name in COUNTS.items())),
        ("hub", f"up {clock(get('uptime_s'))}, restarted {number(get('hub_restarts'))} times"),
        *((f"quarantined {one_line(name, 64)}", one_line(why, REASON)) for name, why in _items(get("quarantined"))),
        *(("invalid", f"{one_line(why, REASON)}: {count}") for why, count in _items(get("rejected_reasons"))),
        *(("last invalid", one_line(text, REASON)) for text in [get("last_rejection")] if text),
        *(("stalled", one_line(text, REASON)) for text in [get("stalled")] if text),
    ]


def _canary(status: Mapping[str, Any]) -> str:
    """How far the engines are from the learner on the canary, and the number of each alarm."""
    mean, most = status.get("canary_mean"), status.get("canary_max")
    off = NONE if mean is None or most is None else f"mean {scientific(mean)} nats, at most {scientific(most)} nats"
    alarms = ", ".join(f"{count} {kind}" for kind, count in _items(status.get("canary_alarms")))
    return f"{off}; alarms: {alarms or NONE}"


def _served(actors: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each engine serves, or each server of it: version, digest, difference from the learner, and its source."""
    rows = []
    for actor in actors:
        for one in actor.get("servers") or [actor]:
            url = f" {one_line(one['url'], 64)}" if one.get("url") else ""
            what = f"version {number(one.get('version'))}, digest {one.get('digest') or NONE}"
            canary = (
                f"canary {scientific(one.get('canary'))} nats off" if one.get("canary") is not None else "no canary"
            )
            source = f", weights from {one_line(actor['source'], 64)}" if actor.get("source") else ""
            rows.append((f"{one_line(actor.get('name'), 64)}{url}", f"{what}, {canary}{source}"))
    return rows


def _learner(learner: Mapping[str, Any]) -> str:
    ranks = f"{learner.get('ranks', NONE)} of {learner.get('world_size', NONE)} ranks"
    step = learner.get("training")
    waiting = f"{len(learner.get('requested') or [])} wait for a batch"
    return f"{ranks}, {waiting if step is None else f'training step {step + 1}'}"


def _engine_waits(waits: Mapping[str, Any]) -> str:
    """The shares of the engines' time without requests, by cause."""
    return f"{percent(waits.get('leases'))} of the time for leases, {percent(waits.get('weights'))} for weights"


def _dropped(status: Mapping[str, Any]) -> str:
    """What the trained rollouts do not show; see `hub.settled`."""
    tokens, length, passed = (status.get(key) for key in ("tokens_dropped", "length_bias", "pass_bias"))
    if tokens is None or length is None or passed is None:
        return NONE
    return f"{tokens:.1%} of the tokens; trained rollouts: length {length:+.1%}, pass rate {passed:+.1%} against all"


def _ledger(ledger: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.removeprefix("ledger of "), text) for name, text in ledger_rows(ledger)]


def _items(values: Any) -> list[tuple[str, Any]]:
    return list(values.items()) if isinstance(values, Mapping) else []

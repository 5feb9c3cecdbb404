"""The final metrics of a run, from summary.json; if an interrupted run has none, computed from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.metrics.canary import alarm_text, canary_summary
from sgpo_async.metrics.mismatch import WHERE, mismatch_summary
from sgpo_async.report.numbers import NONE, clock, number, percent, scientific


def final_rows(folder: str | Path) -> list[tuple[str, str]]:
    """Return (name, value) of each final metric of the run in `folder`. Raises DataError for an unreadable file."""
    return summary_rows(read_summary(folder) or summarise(read_metrics(folder)))


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the keys of summary.json that depend only on metrics. Shares and lag are means over steps."""
    if not lines:
        return {}
    last = lines[-1]
    auto, guided = _present(lines, "eval_pass_auto"), _present(lines, "eval_pass_guided")
    return {
        "steps": last["step"],
        "wall_s": last.get("wall_s"),
        "actors": last.get("actors"),
        "pass_auto_first": auto[0] if auto else None,
        "pass_auto_last": auto[-1] if auto else None,
        "pass_guided_first": guided[0] if guided else None,
        "pass_guided_last": guided[-1] if guided else None,
        "weight_version": last.get("version"),
        "lag_mean": _mean(_present(lines, "lag_mean")),
        "lag_max": max(_present(lines, "lag_max"), default=None),
        "tokens_generated": last.get("tokens_generated"),
        "tokens_trained": last.get("tokens_trained"),
        "learner_idle": _mean(_present(lines, "learner_idle")),
        "engine_idle": _mean(_present(lines, "engine_idle")),
        "ledger": last.get("ledger"),
        "mismatch": mismatch_summary(lines),
        "canary": canary_summary(lines),
        "evaluations": [
            {"lag": line.get("eval_lag"), "benchmarks": list(line["eval_benchmarks"].values())}
            for line in lines
            if line.get("eval_benchmarks")
        ],
    }


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value with unit) of each metric in the summary."""
    get = summary.get
    wall, generated, trained = get("wall_s"), get("tokens_generated"), get("tokens_trained")
    rate = generated / wall if generated is not None and wall else None
    rows = [
        ("held-out pass rate, alone", _change(get("pass_auto_first"), get("pass_auto_last"))),
        ("held-out pass rate, guided", _change(get("pass_guided_first"), get("pass_guided_last"))),
        *benchmark_rows(get("evaluations") or []),
        ("steps", number(get("steps")) + " (interrupted)" * bool(get("interrupted"))),
        ("wall time", clock(wall)),
        ("tokens generated", f"{number(generated)} ({number(rate)} a second)"),
        ("tokens trained", number(trained)),
        ("lag of trained tokens", f"mean {number(get('lag_mean'))}, at most {number(get('lag_max'))} versions"),
        ("idle", f"trainer {percent(get('learner_idle'))}, engines {percent(get('engine_idle'))}"),
    ]
    checks = mismatch_rows(get("mismatch") or {}) + canary_rows(get("canary") or {})
    return rows + checks + ledger_rows(get("ledger") or {})


def benchmark_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return avg@k of each benchmark in the first and last evaluation, with interval and lag of the last one."""
    rounds = [evaluation for evaluation in evaluations if evaluation.get("benchmarks")]
    if not rounds:
        return []
    rows = []
    lag = number(rounds[-1].get("lag"))
    for first, last in zip(rounds[0]["benchmarks"], rounds[-1]["benchmarks"], strict=True):
        interval = f"[{percent(last['low'])}, {percent(last['high'])}], {last['problems']} problems, lag {lag}"
        rows.append((f"{last['name']}, avg@{last['samples']}", f"{_change(first['avg'], last['avg'])} {interval}"))
    return rows


def mismatch_rows(mismatch: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the mismatch between engine and learner at lag 0 (of `mismatch_summary`); [] if it was not measured."""
    if not mismatch:
        return []
    name = "mismatch at lag 0"
    if not mismatch["judged"]:
        return [(name, "not judged: too few tokens had lag 0")]
    mean, largest, bound = (scientific(mismatch[key]) for key in ("mean", "max", "bound"))
    text = f"mean at most {mean} nats (bound {bound}), single token at most {largest}"
    return [(name, f"{text}, judged in {mismatch['judged']} steps"), *mismatch_alarm(mismatch)]


def mismatch_alarm(mismatch: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return one row with the number of steps above the bound; [] if there are none."""
    if not mismatch.get("alarms"):
        return []
    mean, bound = (scientific(mismatch[key]) for key in ("mean", "bound"))
    worst = f"{mean}, {WHERE[mismatch['worst_span']]}, in step {mismatch['worst_step']}"
    steps = f"in {mismatch['alarms']} of {mismatch['judged']} judged steps"
    return [("MISMATCH ALARM", f"{steps} engine and learner differ by more than {bound} nats; worst: {worst}")]


def canary_rows(canary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how far engines differ from the learner on the canary (of `canary_summary`); [] if it was not scored."""
    if not canary or canary["mean"] is None:
        return canary_alarm(canary)
    mean, largest = scientific(canary["mean"]), scientific(canary["max"])
    return [("canary", f"mean {mean} nats, at most {largest} nats"), *canary_alarm(canary)]


def canary_alarm(canary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return one row with the hub's alarms about what engines serve; [] if there are none."""
    text = alarm_text(canary.get("alarms"))
    return [("WEIGHTS ALARM", text.removeprefix("weights alarm: "))] if text else []


def ledger_rows(ledger: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the equation dispatched = trained + dropped (by reason) + in flight + buffered, for tasks and rollouts."""
    if not ledger:
        return []
    counts = {"tasks": ledger.get("tasks", ledger), "rollouts": ledger.get("rollouts")}
    return [(f"ledger of {name}", _balance(count)) for name, count in counts.items() if isinstance(count, Mapping)]


def _balance(count: Mapping[str, Any]) -> str:
    dropped = count.get("dropped", 0)
    reasons = ""
    if isinstance(dropped, Mapping):
        named = [f"{reason} {amount}" for reason, amount in dropped.items() if amount]
        reasons = f" ({', '.join(named)})" if named else ""
        dropped = sum(dropped.values())
    parts = [count.get("trained"), dropped, count.get("in_flight"), count.get("buffered")]
    text = (
        f"{count.get('dispatched', NONE)} dispatched = {parts[0]} trained + {dropped} dropped{reasons}"
        f" + {parts[2]} in flight + {parts[3]} buffered"
    )
    balanced = all(isinstance(part, int) for part in parts) and count.get("dispatched") == sum(parts)
    return text if balanced else f"{text}: NOT BALANCED"


def _change(first: Any, last: Any) -> str:
    return percent(last) if first is None else f"{percent(first)} → {percent(last)}"


def _present(lines: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [line[key] for line in lines if line.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None

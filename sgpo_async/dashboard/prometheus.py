"""The metrics of a run in Prometheus' text format.

A counter goes down when the hub is restored from a checkpoint; Prometheus takes that for a restart, as it should. A
value that is not known has no sample, but its name, help and unit are always there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sgpo_async.dashboard.observer import STATES, RunView
from sgpo_async.local.display import View
from sgpo_async.logs import one_line

PREFIX = "sgpo_async_"
ACTORS = 256  # that have samples of their own: names come from outside
REASONS = 32  # by which the ledger drops
LABEL = 64  # characters

Samples = Iterable[tuple[tuple[str, ...], Any]]

# Without labels: name, help, key of the status or of metrics.jsonl ("a/b": entry b of a).
GAUGES = (
    ("step", "Optimiser steps done.", "step"),
    ("weight_version", "Version of the learner's weights.", "version"),
    ("published_version", "Newest weight version that actors can have.", "published"),
    ("lag_mean_versions", "Mean lag of the tokens of the last batch.", "lag/mean"),
    ("lag_max_versions", "Largest lag of a token of the last batch.", "lag/max"),
    ("tokens_per_second", "Tokens that all engines generate per second.", "tokens_per_s"),
    ("buffered_groups", "Complete groups that wait to be trained.", "buffer"),
    ("tokens_dropped_ratio", "Share of the sampled tokens that are dropped.", "tokens_dropped"),
    ("uniform_groups_ratio", "Share of groups whose autonomous rollouts have equal rewards.", "uniform"),
    ("cut_rollouts_ratio", "Share of rollouts that max_new_tokens has cut.", "cut"),
    ("canary_mean_nats", "Mean difference of the engines from the learner on the canary.", "canary_mean"),
    ("canary_max_nats", "Largest difference of an engine from the learner on the canary.", "canary_max"),
    ("uptime_seconds", "Time since the hub began, restarts included.", "uptime_s"),
    ("loss", "Total loss of the last step (Eq. 7).", "loss"),
    ("grpo_loss", "Its policy gradient term.", "grpo_loss"),
    ("distillation_loss", "Its distillation term.", "kd_loss"),
    ("alpha", "Mean weight of distillation (Eq. 6).", "alpha"),
    ("entropy_nats", "Entropy of the policy per token.", "entropy"),
    ("kl_nats", "Mean KL from the guided to the unguided distribution (Eq. 3).", "kl_mean"),
    ("gradient_norm", "Norm of the gradient before clipping.", "grad_norm"),
    ("learning_rate", "Learning rate of the last step.", "lr"),
    ("correction_mean", "Mean weight of the off-policy correction.", "correction_mean"),
    ("correction_clipped_ratio", "Share of tokens whose correction is limited or clipped.", "correction_clipped"),
)
COUNTERS = (
    ("tokens_generated", "Tokens of all accepted rollouts, with those that environments wrote.", "tokens_generated"),
    ("tokens_trained", "Tokens that were trained.", "tokens_trained"),
    ("actors_joined", "Actors that have joined.", "joined"),
    ("actors_left", "Actors that have left or were lost.", "left"),
    ("members_refused", "Members that the hub has refused.", "refused"),
    ("leases_reissued", "Leases that were given to another actor.", "leases_reissued"),
    ("leases_moved", "Leases that were moved from a slow actor.", "leases_moved"),
    ("duplicates", "Rollouts that arrived again.", "duplicates"),
    ("invalid_messages", "Messages and rollouts that the hub did not accept.", "rejected"),
    ("hub_restarts", "Restarts of the hub from its journal.", "hub_restarts"),
)
ACTOR = (
    ("actor_weight_version", "Weight version that the actor serves.", "version"),
    ("actor_lag_versions", "Versions by which it is behind the learner.", "lag"),
    ("actor_leases", "Leases that it has.", "leases"),
    ("actor_running_sequences", "Sequences in its engine.", "running"),
    ("actor_tokens_per_second", "Tokens that it generates per second.", "tokens_per_s"),
    ("actor_idle_ratio", "Share of its last heartbeat's time without requests.", "idle"),
    ("actor_canary_nats", "Its difference from the learner on the canary.", "canary"),
)


def exposition(run: RunView) -> bytes:
    """The whole text."""
    registry = CollectorRegistry()
    registry.register(_Run(run))
    return generate_latest(registry)


class _Run(Collector):
    """One collection of the metrics of one view."""

    def __init__(self, run: RunView) -> None:
        self._run = run

    def collect(self) -> Iterator[Metric]:
        run, view = self._run, self._run.view
        yield _family("up", "1 while the hub answers and the run makes progress, or has ended.", [((), run.healthy)])
        states = [((state,), state == run.state) for state in STATES]
        yield _family("state", "1 for the state that the run is in.", states, labels=["state"])
        yield _family("steps", "Optimiser steps of the whole run.", [((), view.steps or None)])
        yield _family("status_age_seconds", "Time since the hub's last answer.", [((), run.age_s)])
        for name, text, key in GAUGES:
            yield _family(name, text, [((), _value(view, key))])
        for name, text, key in COUNTERS:
            yield _family(name, text, [((), _value(view, key))], counter=True)
        yield from _rates(view)
        yield from _idle(view)
        yield from _ledger(view)
        yield from _fleet(view)


def _rates(view: View) -> Iterator[Metric]:
    _, held_out = view.held_out()
    modes = {"autonomous": "pass_auto", "guided": "pass_guided"}
    found = [((mode, "training"), view.get(key)) for mode, key in modes.items()]
    found += [((mode, "held_out"), held_out.get(key, view.metrics.get(f"eval_{key}"))) for mode, key in modes.items()]
    yield _family("pass_ratio", "Share of correct rollouts.", found, labels=["mode", "problems"])
    scores = [((score["name"],), score["avg"]) for score in view.benchmarks()]
    yield _family("benchmark_pass_ratio", "avg@k of a benchmark.", scores, labels=["benchmark"])
    mismatch = [((span,), view.metrics.get(f"mismatch_mean_lag0_{span}")) for span in ("first", "later")]
    text = "Mean difference of the log-probabilities of engine and learner at lag 0, by kind of span."
    yield _family("mismatch_nats", text, mismatch, labels=["span"])


def _idle(view: View) -> Iterator[Metric]:
    trainer, engines = view.metrics.get("learner_waits") or {}, view.get("engine_waits") or {}
    text = "Share of the last step in which the trainer waited, by cause."
    yield _family("trainer_wait_ratio", text, (((cause,), share) for cause, share in trainer.items()), labels=["cause"])
    text = "Share of the engines' time without requests since the hub began, by cause."
    yield _family("engine_wait_ratio", text, (((cause,), share) for cause, share in engines.items()), labels=["cause"])


def _ledger(view: View) -> Iterator[Metric]:
    ledger = view.get("ledger") or {}
    accounts = {"tasks": ledger, "rollouts": ledger.get("rollouts") or {}}
    for key in ("dispatched", "trained"):
        for name, account in accounts.items():
            yield _family(f"{name}_{key}", f"{name.title()} {key}.", [((), account.get(key))], counter=True)
    for name, account in accounts.items():
        dropped = list((account.get("dropped") or {}).items())[:REASONS]
        found = [((why,), count) for why, count in dropped]
        yield _family(f"{name}_dropped", f"{name.title()} dropped.", found, labels=["reason"], counter=True)
        for key in ("in_flight", "buffered"):
            yield _family(f"{name}_{key}", f"{name.title()} {key.replace('_', ' ')}.", [((), account.get(key))])


def _fleet(view: View) -> Iterator[Metric]:
    status = view.status
    actors = status.get("actors") or []
    yield _family("actors", "Connected actors.", [((), len(actors) if status else view.metrics.get("actors"))])
    yield _family("quarantined_actors", "Actors in quarantine.", [((), len(status.get("quarantined") or {}))])
    alarms = [((kind,), count) for kind, count in (view.get("canary_alarms") or {}).items()]
    yield _family("canary_alarms", "Scores of the canary that raised an alarm.", alarms, labels=["kind"], counter=True)
    for name, text, key in ACTOR:
        yield _family(name, text, (((str(a.get("name")),), a.get(key)) for a in actors[:ACTORS]), labels=["actor"])


def _family(name: str, text: str, samples: Samples, *, labels: Iterable[str] = (), counter: bool = False) -> Metric:
    """One metric with the samples whose values are known; the first of those with equal labels."""
    kind = CounterMetricFamily if counter else GaugeMetricFamily
    family = kind(PREFIX + name, text, labels=list(labels))
    known: dict[tuple[str, ...], float] = {}
    for key, value in samples:
        if isinstance(value, int | float):
            known.setdefault(tuple(one_line(part, LABEL) for part in key), float(value))
    for key, value in known.items():
        family.add_metric(list(key), value)
    return family


def _value(view: View, key: str) -> Any:
    outer, _, inner = key.partition("/")
    value = view.step if outer == "step" else view.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else value

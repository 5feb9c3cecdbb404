"""Every key of metrics.jsonl: its section, unit and meaning.

The table gives TensorBoard, W&B and MLflow their names (`name_of`), the report and the dashboard their sections, and
docs/metrics.md its text (`page.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Section = Literal["eval", "train", "mismatch", "system"]
SECTIONS: Mapping[Section, str] = {
    "eval": "pass rates on held-out problems and benchmarks, measured by the actors during training",
    "train": "the batches that were trained, and what the optimiser did with them",
    "mismatch": "how far what was trained differs from what sampled it: lag, corrections, engine against learner",
    "system": "time, throughput, and what became of every rollout",
}
RATIO, NATS, TOKENS, VERSIONS, SECONDS = "share", "nats per token", "tokens", "versions", "s"
REST = "other"  # the section of a key that the table lacks, in a file of another release
HISTOGRAM = "_histogram"  # the end of a key whose value counts tokens by lag


@dataclass(frozen=True)
class Metric:
    """One key. `meaning` is one sentence, and says what the entries are if the value is an object or a list."""

    key: str
    section: Section
    unit: str
    meaning: str

    @property
    def name(self) -> str:
        """The name of its scalars in a tracker: the section, then the key without eval_ or mismatch_ before it."""
        own = self.key.removeprefix(f"{self.section}_") if self.section in ("eval", "mismatch") else self.key
        return f"{self.section}/{own}"


def _spans(key: str, unit: str, meaning: str) -> Iterator[Metric]:
    """The key at lag 0 and at larger lags, each in first and in later spans."""
    for age, tokens in (("lag0", "tokens at lag 0"), ("stale", "stale tokens")):
        for span, spans in (("first", "first spans"), ("later", "spans after an update in flight")):
            yield Metric(f"mismatch_{key}_{age}_{span}", "mismatch", unit, f"{meaning} of {tokens} in {spans}.")


def _corrections(term: str, loss: str) -> Iterator[Metric]:
    """Mean, clipped share and minimum of one term's correction weights: of all tokens, at lag 0, and of stale ones."""
    for suffix, tokens in (("", ""), ("_lag0", " at lag 0"), ("_stale", " of stale tokens")):
        for part, unit, text in (
            ("mean", "1", f"Mean correction weight{tokens or ' of all tokens'} in the {loss} loss."),
            (
                "clipped",
                RATIO,
                f"Tokens{tokens} whose weight in the {loss} loss is limited by the bound, or 0 by the clip.",
            ),
            ("min", "1", f"Smallest correction weight{tokens or ' of any token'} in the {loss} loss."),
        ):
            yield Metric(f"{term}_{part}{suffix}", "mismatch", unit, text)


STEPS = (
    Metric("eval_pass_auto", "eval", RATIO, "Held-out problems solved without the strategy."),
    Metric("eval_pass_guided", "eval", RATIO, "Held-out problems solved with the strategy."),
    Metric("eval_version", "eval", "version", "Weight version whose evaluation was requested."),
    Metric("eval_served", "eval", "version", "Oldest and newest version that sampled a completion of the evaluation."),
    Metric("eval_lag", "eval", VERSIONS, "Mean lag of the evaluation's tokens behind the learner at its end."),
    Metric(
        "eval_benchmarks",
        "eval",
        RATIO,
        "Of each benchmark: avg (avg@k), low and high (95 % interval), samples (k), problems, pass_at (pass@n by n).",
    ),
    Metric("loss", "train", "1", "Total loss (Eq. 7)."),
    Metric("grpo_loss", "train", "1", "Its policy gradient term (Eq. 1)."),
    Metric("kd_loss", "train", "1", "Its distillation term (Eq. 3)."),
    Metric("likelihood_loss", "train", "1", "Its term of demonstrations (objectives sft, luffy and hpt)."),
    Metric("pass_auto", "train", RATIO, "Correct rollouts without the strategy, mean over the problems of the batch."),
    Metric("pass_guided", "train", RATIO, "Correct rollouts with the strategy, mean over the problems of the batch."),
    Metric("reward_auto", "train", "1", "Mean reward without the strategy."),
    Metric("reward_guided", "train", "1", "Mean reward with the strategy."),
    Metric("uniform", "train", RATIO, "Groups whose autonomous rollouts have equal rewards: no policy gradient."),
    Metric("cut", "train", RATIO, "Rollouts that max_new_tokens has cut."),
    Metric("length_auto", "train", TOKENS, "Mean length of completions without the strategy."),
    Metric("length_guided", "train", TOKENS, "Mean length of completions with the strategy."),
    Metric("patterns", "train", RATIO, "Completions without the strategy in which each of learner.patterns is found."),
    Metric(
        "quotes", "train", RATIO, "Completions without the strategy that quote that of their problem, and of another."
    ),
    Metric("kl_classes", "train", NATS, "Mean KL on distilled tokens of each of learner.token_classes, and of others."),
    Metric("entropy", "train", NATS, "Entropy of the policy on its own rollouts."),
    Metric("kept_mean", "train", TOKENS, "Mean number of tokens that top_p and top_k keep."),
    Metric("alpha", "train", "1", "Mean weight of distillation in use (Eq. 6)."),
    Metric("alpha_observed", "train", "1", "The weight by the observed pass rates (pass_rates=corrected)."),
    Metric("p_auto_corrected", "train", RATIO, "Autonomous pass rate, corrected to the present weights."),
    Metric("p_guide_corrected", "train", RATIO, "Guided pass rate, corrected to the present weights."),
    Metric(
        "kl_mean", "train", NATS, "Mean KL from the guided to the unguided distribution on distilled rollouts (Eq. 3)."
    ),
    Metric("kl_masked_fraction", "train", RATIO, "Distilled tokens with a divergence above delta (Eq. 5)."),
    Metric("kl_masked_mass", "train", RATIO, "Their part of the total divergence."),
    Metric("kl_limited_mass", "train", RATIO, "The part of the total divergence that the limiter removes."),
    Metric(
        "targets",
        "train",
        "rollouts",
        "Distilled sequences: one for each rollout and divergence; 0 with divergence=sft.",
    ),
    Metric("tokens", "train", TOKENS, "Trained tokens of the step."),
    Metric(
        "tokens_forward_only",
        "train",
        TOKENS,
        "Tokens of forward passes without gradient: for the teacher, for corrected pass rates.",
    ),
    Metric("tokens_trained", "train", TOKENS, "Trained tokens since the run began."),
    Metric("grad_norm", "train", "1", "Norm of the gradient before clipping."),
    Metric("lr", "train", "1", "Learning rate."),
    Metric("lag_mean", "mismatch", VERSIONS, "Mean lag of the trained tokens."),
    Metric("lag_max", "mismatch", VERSIONS, "Largest lag of a trained token."),
    Metric("lag_histogram", "mismatch", TOKENS, "Trained tokens by lag."),
    Metric("tokens_stale", "mismatch", TOKENS, "Tokens older than hub.max_lag, left out of the loss (hub.stale=mask)."),
    Metric("ratio_mean", "mismatch", "1", "Mean of policy probability / behaviour probability."),
    Metric("ratio_by_lag", "mismatch", "1", "The same by lag."),
    *_corrections("correction", "policy gradient"),
    *_corrections("kl_correction", "distillation"),
    *_spans("tokens", TOKENS, "Number"),
    *_spans("mean", NATS, "Mean |log pi − log mu|"),
    *_spans("max", "nats", "Largest |log pi − log mu|"),
    *_spans("kl", NATS, "Estimate (k3) of KL(mu || pi)"),
    Metric("mismatch_by_lag", "mismatch", NATS, "Mean |log pi − log mu| by lag."),
    Metric("mismatch_bound", "mismatch", NATS, "Bound of the mean at lag 0; above it, the run raises an alarm."),
    Metric("mismatch_judged_first", "mismatch", NATS, "Mean at lag 0 in first spans that was compared with the bound."),
    Metric("mismatch_judged_later", "mismatch", NATS, "The same in spans after an update in flight."),
    Metric("canary_mean", "mismatch", NATS, "Mean difference of the engines from the learner on one fixed sequence."),
    Metric("canary_max", "mismatch", NATS, "Largest difference of an engine on it."),
    Metric("canary_alarms", "mismatch", "scores", "Scores that raised an alarm, by kind: differs, stuck, moved."),
    Metric("step", "system", "steps", "Optimiser steps done."),
    Metric("version", "system", "version", "Weight version after the step."),
    Metric("wall_s", "system", SECONDS, "Time in the training loop, interruptions not counted."),
    Metric("actors", "system", "actors", "Connected actors."),
    Metric("running", "system", "sequences", "Sequences in all engines at the last heartbeat of each."),
    Metric("tokens_per_s", "system", "tokens/s", "Tokens that all engines generate per second."),
    Metric(
        "tokens_generated",
        "system",
        TOKENS,
        "Tokens of all accepted rollouts since the run began, with those that environments wrote.",
    ),
    Metric("learner_idle", "system", RATIO, "Part of the step in which the trainer waited for a batch."),
    Metric(
        "learner_waits",
        "system",
        RATIO,
        "Part of the step in which it waited, by cause: batch, publication, checkpoint.",
    ),
    Metric("engine_idle", "system", RATIO, "Time of the engines without a request, since the hub began."),
    Metric("engine_waits", "system", RATIO, "The same by cause: leases, weights."),
    Metric("imbalance", "system", RATIO, "Time of the ranks in which they wait for others, estimated from FLOPs."),
    Metric("tokens_dropped", "system", RATIO, "Sampled tokens of groups that were dropped, of all that are settled."),
    Metric("length_bias", "system", RATIO, "By how much trained rollouts are longer than all that are settled."),
    Metric("pass_bias", "system", RATIO, "By how much the pass rate of trained rollouts exceeds that of all."),
    Metric(
        "ledger",
        "system",
        "tasks",
        "What became of every task, and of every rollout in `rollouts`: "
        "dispatched = trained + dropped (by reason) + in_flight + buffered.",
    ),
)
"""Keys of a training run."""

WARM_UP = (
    Metric("train_loss", "train", NATS, "Training loss of the step."),
    Metric("validation_loss", "eval", NATS, "Loss on the validation problems."),
    Metric("epoch", "train", "epochs", "Epochs done."),
)
"""Keys that only `sgpo-async sft` writes, beside step, wall_s, grad_norm, lr and tokens."""

METRICS: Mapping[str, Metric] = {metric.key: metric for metric in (*STEPS, *WARM_UP)}


def section_of(key: str) -> str:
    """The section of a key, which may be a/b for the entry b of the object a; REST if the table lacks it."""
    metric = METRICS.get(key.partition("/")[0])
    return metric.section if metric else REST


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name, without `step`; lists, histograms and unknown values left out.

    The entry b of the object a has the name of a, a slash and b, such as system/ledger/dropped/stale.
    """
    found: dict[str, float] = {}
    for key, value in line.items():
        if key != "step" and not key.endswith(HISTOGRAM):
            _flatten(name_of(key), value, found)
    return found


def name_of(key: str) -> str:
    """The name of a key in trackers."""
    return METRICS[key].name if key in METRICS else f"{REST}/{key}"


def histograms(line: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """The histograms of a line by name: the number of tokens by lag; those without tokens are left out."""
    return {
        name_of(key): {int(lag): float(count) for lag, count in sorted(value.items(), key=lambda item: int(item[0]))}
        for key, value in line.items()
        if key.endswith(HISTOGRAM) and value
    }


def _flatten(name: str, value: Any, found: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(f"{name}/{key}", inner, found)
    elif isinstance(value, int | float):
        found[name] = value

"""What to change in a run: rules from the hub's status and recent metrics to a fault, its evidence and its remedy.

Every rule is a pure function of `Facts`. It says nothing while it knows too little. The remedy names the exact
configuration key or command.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from sgpo_async.installation import under_torchrun
from sgpo_async.logs import one_line
from sgpo_async.metrics.canary import alarm_text
from sgpo_async.metrics.mismatch import alarms
from sgpo_async.report.numbers import number, percent

RECENT = 20  # steps that count as recent: enough to average out the noise of a batch, few enough to follow a change
ENOUGH = 10  # ... of which a rule about means needs so many
EARLY = 5  # first steps, in which processes start and buffers fill

TRAINER_IDLE = 0.3  # a third of the trainer's time: below, a change of the fleet gains little
ENGINES_IDLE = 0.3  # the same of the engines'
STORING = 0.1  # share of a step that waits for publication or checkpoint; both are meant to overlap with training
DROPPED = 0.1  # share of the sampled tokens: more than ten percent of the fleet works for nothing
BIAS = 0.05  # by which trained rollouts may be shorter than all, as `hub.settled` judges
CLIPPED = 0.2  # share of tokens whose correction is limited: then the update is no longer that of the policy
SPIKE = 10.0  # times the median: noise of a batch is within a factor of three
COLLAPSED = 0.1  # of the entropy at the beginning, and ...
LOW_ENTROPY = 0.02  # ... nats per token: nearly all tokens are certain
EASY, HARD = 0.98, 0.01  # pass rates at which a group of eight is seldom mixed
UNIFORM = 0.9  # share of groups of equal rewards: nine tenths of the sampled tokens give the policy gradient nothing
LEARNED = 0.8  # pass rate alone: above, strategies need not help any more, and the policy may be sure of itself
HELPS = 0.01  # by which guided rollouts must be better than autonomous ones
CUT = 0.1  # share of rollouts: more distorts the rewards of long ones
CHARS = 300  # of a text from outside

Severity = Literal["alarm", "warning", "hint"]  # wrong results or a halt; wasted work; worth knowing


@dataclass(frozen=True)
class Advisory:
    """One line of advice."""

    severity: Severity
    what: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Facts:
    """The hub's status ({} without a hub), lines of metrics.jsonl, and settings as plain data ({}: not known)."""

    status: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def recent(self) -> Sequence[Mapping[str, Any]]:
        """The newest lines, without those of the beginning of the run."""
        return [line for line in self.lines[-RECENT:] if line["step"] > EARLY]

    def values(self, key: str) -> list[float]:
        """The recent values of a metric; "a/b" is the entry b of the object a."""
        outer, _, inner = key.partition("/")
        found = [line.get(outer) for line in self.recent]
        if inner:
            found = [value.get(inner) if isinstance(value, Mapping) else None for value in found]
        return [value for value in found if value is not None]

    def mean(self, key: str) -> float | None:
        """Their mean; None if there are fewer than ENOUGH."""
        values = self.values(key)
        return fmean(values) if len(values) >= ENOUGH else None

    def setting(self, section: str, key: str) -> Any:
        """The value of section.key; None if it is not known."""
        return (self.settings.get(section) or {}).get(key)

    def key(self, section: str, key: str) -> str:
        """The key with its present value, if that is known: hub.max_lag (now 2)."""
        value = self.setting(section, key)
        return f"{section}.{key}" + (f" (now {one_line(value, 64)})" if value is not None else "")


Rule = Callable[[Facts], Advisory | None]


def advise(facts: Facts) -> list[Advisory]:
    """Return the advice of every rule that has any, the worst first."""
    found = [advisory for rule in RULES if (advisory := rule(facts))]
    order: list[Severity] = ["alarm", "warning", "hint"]
    return sorted(found, key=lambda advisory: order.index(advisory.severity))


def advice_after(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, evidence and remedy) of each warning about a run that has ended; its alarms are final metrics already."""
    found = [advisory for advisory in advise(Facts({}, lines, settings)) if advisory.severity == "warning"]
    return [(advisory.what, f"{advisory.evidence}; {advisory.remedy}") for advisory in found]


def stalled(facts: Facts) -> Advisory | None:
    """Nothing has moved for hub.stall_s."""
    reason = facts.status.get("stalled")
    remedy = "do what the line says; `kill -USR1 PID` prints the stacks of a process into its log"
    return Advisory("alarm", "The run makes no progress", one_line(reason, CHARS), remedy) if reason else None


def wrong_weights(facts: Facts) -> Advisory | None:
    """Engines compute other log-probabilities than the learner."""
    raised = facts.status.get("canary_alarms") or (facts.lines[-1].get("canary_alarms") if facts.lines else None)
    text = one_line(alarm_text(raised), CHARS)
    remedy = f"start these engines again; if precision explains it, raise {facts.key('hub', 'canary_tolerance')}"
    return Advisory("alarm", "Engines may serve wrong weights", text, remedy) if text else None


def mismatched(facts: Facts) -> Advisory | None:
    """The mismatch at lag 0 was above its bound in a recent step."""
    found = alarms(facts.recent)
    if not found:
        return None
    bound = facts.key("learner", "mismatch_bound")
    remedy = f"give engine and learner the same precision (model.dtype), or raise {bound} if that explains it"
    return Advisory("alarm", "Engine and learner disagree", found[-1].text, remedy)


def quarantined(facts: Facts) -> Advisory | None:
    """The hub takes nothing more from an actor."""
    actors = facts.status.get("quarantined") or {}
    if not actors:
        return None
    names = ", ".join(f"{one_line(name, 64)}: {one_line(why, CHARS)}" for name, why in list(actors.items())[:5])
    remedy = "repair and restart it: `sgpo-async actor --hub ADDRESS`; the same version of sgpo-async and model?"
    return Advisory("warning", f"{len(actors)} actors in quarantine", names, remedy)


def rejected(facts: Facts) -> Advisory | None:
    """Messages or rollouts were impossible."""
    count = facts.status.get("rejected") or 0
    evidence = f"{count} so far; the last: {one_line(facts.status.get('last_rejection') or '', CHARS)}"
    remedy = "see the hub's log for who sent them; update that node, or keep strangers out by hub.keys"
    return Advisory("warning", "Invalid messages", evidence, remedy) if count else None


def restarted(facts: Facts) -> Advisory | None:
    """The hub has crashed."""
    count = facts.status.get("hub_restarts") or 0
    remedy = "read the end of the earlier logs, logs/hub*.log in the run's folder: memory, disk?"
    return Advisory("warning", "The hub was restarted", f"restarts so far: {count}", remedy) if count else None


def trainer_idle(facts: Facts) -> Advisory | None:
    """The trainer waits for batches: too few rollouts, or, if engines wait as well, too little overlap."""
    idle, engines = facts.mean("learner_idle"), facts.mean("engine_idle")
    if idle is None or idle <= TRAINER_IDLE:
        return None
    evidence = f"the trainer waits {percent(idle)} of the time for batches, engines are idle {percent(engines)}"
    if engines is not None and engines > ENGINES_IDLE:
        remedy = f"let more batches overlap: raise {facts.key('hub', 'max_lag')} or hub.batches_in_flight"
        return Advisory("warning", "Trainer and engines wait for each other", evidence, remedy)
    remedy = "start more actors where cores or GPUs are free (`sgpo-async actor --hub ADDRESS`), or raise "
    return Advisory("warning", "Too few rollouts", evidence, remedy + facts.key("engine", "slots"))


def engines_idle(facts: Facts) -> Advisory | None:
    """Engines have no requests although the trainer is busy."""
    idle, trainer = facts.mean("engine_idle"), facts.mean("learner_idle")
    if idle is None or trainer is None or idle <= ENGINES_IDLE or trainer > TRAINER_IDLE:
        return None
    weights = facts.mean("engine_waits/weights") or 0.0
    evidence = f"engines are idle {percent(idle)} of the time ({percent(weights)} for weights), the trainer "
    evidence += percent(trainer)
    if weights > idle / 2:
        remedy = "a shorter way for the weights: hub.weight_deltas=always, hub.weight_fanout, or actors' --weights-by"
        return Advisory("warning", "Engines wait for weights", evidence, remedy)
    remedy = f"stop some actors, or raise {facts.key('learner', 'problems_per_step')} or {facts.key('hub', 'max_lag')}"
    return Advisory("warning", "More engines than the trainer needs", evidence, remedy)


def storing(facts: Facts) -> Advisory | None:
    """Training waits for publications or checkpoints, which should overlap with it."""
    shares = {cause: facts.mean(f"learner_waits/{cause}") or 0.0 for cause in ("publication", "checkpoint")}
    cause = max(shares, key=lambda name: shares[name])
    if shares[cause] <= STORING:
        return None
    remedies = {
        "publication": "publish less: learner.lora.rank > 0, or steps with more work: raise learner.problems_per_step",
        "checkpoint": "write fewer checkpoints (learner.checkpoint_every, checkpoint_minutes), to a faster disk",
    }
    evidence = f"{percent(shares[cause])} of a step waits for the {cause}"
    return Advisory("warning", f"Training waits for the {cause}", evidence, remedies[cause])


def dropped(facts: Facts) -> Advisory | None:
    """Sampled tokens are dropped, or those that are trained are shorter than all."""
    share, bias = facts.mean("tokens_dropped"), facts.mean("length_bias")
    if share is None or (share <= DROPPED and (bias or 0.0) >= -BIAS):
        return None
    evidence = (
        f"{percent(share)} of the sampled tokens are dropped; trained rollouts are {percent(-(bias or 0.0))} shorter"
    )
    remedy = f"set hub.stale=correct (now {facts.setting('hub', 'stale')}), or raise {facts.key('hub', 'max_lag')}"
    return Advisory("warning", "Rollouts are dropped as stale", evidence, remedy)


def clipped(facts: Facts) -> Advisory | None:
    """The off-policy correction is limited for many tokens."""
    share = facts.mean("correction_clipped")
    if share is None or share <= CLIPPED:
        return None
    ratio = facts.mean("correction_mean_stale")
    evidence = (
        f"{percent(share)} of the tokens have a limited weight, or none; mean weight of stale tokens {number(ratio)}"
    )
    remedy = f"lower {facts.key('hub', 'max_lag')} or {facts.key('optim', 'lr')}"
    return Advisory("warning", "The policy leaves its rollouts behind", evidence, remedy)


def spiked(facts: Facts) -> Advisory | None:
    """A gradient was far above the usual."""
    norms = facts.values("grad_norm")
    clip = facts.setting("optim", "grad_clip") or 0.0  # below it, the optimiser sees nothing unusual
    if len(norms) < ENOUGH or max(norms) <= max(SPIKE * median(norms), clip):
        return None
    evidence = f"norm {number(max(norms))} in the last {len(norms)} steps, median {number(median(norms))}"
    remedy = f"lower {facts.key('optim', 'lr')}, or {facts.key('optim', 'grad_clip')}; look at the samples of that step"
    return Advisory("warning", "A gradient spike", evidence, remedy)


def collapsed(facts: Facts) -> Advisory | None:
    """The policy has stopped to explore while it still fails."""
    now, first = facts.mean("entropy"), [line["entropy"] for line in facts.lines if line.get("entropy") is not None]
    solved = facts.mean("pass_auto")
    if now is None or solved is None or solved > LEARNED or not first:
        return None
    began = fmean(first[:ENOUGH])
    if now > LOW_ENTROPY or now > COLLAPSED * began:
        return None
    evidence = f"{number(now)} nats per token, {number(began)} at the beginning, at a pass rate of {percent(solved)}"
    remedy = f"lower {facts.key('optim', 'lr')}, or raise {facts.key('rollout', 'temperature')}"
    return Advisory("warning", "The entropy has collapsed", evidence, remedy)


def no_signal(facts: Facts) -> Advisory | None:
    """Nearly all rollouts of a problem have the same reward."""
    alone, guided, uniform = (facts.mean(key) for key in ("pass_auto", "pass_guided", "uniform"))
    if alone is None:
        return None
    evidence = f"pass rate {percent(alone)} alone, {percent(guided)} with strategies"
    evidence += f"; {percent(uniform)} of the groups have equal rewards" if uniform is not None else ""
    if alone >= EASY:
        remedy = "end the run, or give harder problems: tasks.path"
        return Advisory("hint", "Nearly all problems are solved", evidence, remedy)
    if alone <= HARD and (guided or 0.0) <= HARD:
        warm_up = shlex.join(["torchrun", *under_torchrun("sft"), "CONFIG"])
        remedy = f"easier problems (tasks.path), or a warm-up first: {warm_up}"
        return Advisory("warning", "Nearly no problem is solved", evidence, remedy)
    if uniform is not None and uniform > UNIFORM:
        remedy = f"problems of medium difficulty (tasks.path), or raise {facts.key('rollout', 'autonomous')}"
        return Advisory("hint", "Few groups have a signal", evidence, remedy)
    return None


def useless_strategies(facts: Facts) -> Advisory | None:
    """Strategies do not raise a pass rate that is not high yet."""
    alone, guided = facts.mean("pass_auto"), facts.mean("pass_guided")
    if alone is None or guided is None or guided > alone + HELPS or not HARD < max(alone, guided) < LEARNED:
        return None
    evidence = f"pass rate {percent(guided)} with strategies, {percent(alone)} alone"
    remedy = (
        "look at both sides, `sgpo-async samples RUN`, and check them, `sgpo-async strategies check FILE`; if the "
        f"model does not follow them, change {facts.key('tasks', 'context')}, or train without them: "
        "algorithm.objective=grpo"
    )
    return Advisory("warning", "Strategies do not help", evidence, remedy)


def cut_rollouts(facts: Facts) -> Advisory | None:
    """Many rollouts end by their limit."""
    share = facts.mean("cut")
    if share is None or share <= CUT:
        return None
    evidence = f"{percent(share)} of the rollouts are cut"
    remedy = f"raise {facts.key('rollout', 'max_new_tokens')}, or leave cut ones out: rollout.cut=mask"
    return Advisory("warning", "Rollouts are cut off", evidence, remedy)


def late_weights(facts: Facts) -> Advisory | None:
    """An actor serves weights that are older than the run admits, and so gets no leases."""
    most, published = facts.setting("hub", "max_lag"), facts.status.get("published")
    if most is None or published is None or (facts.status.get("step") or 0) <= EARLY:
        return None
    late = [
        actor
        for actor in facts.status.get("actors") or []
        if actor.get("state") == "serving" and published - (actor.get("version") or 0) > most + 1
    ]
    if not late:
        return None
    evidence = ", ".join(
        f"{one_line(actor.get('name'), 64)} serves version {actor.get('version')} of {published}" for actor in late[:5]
    )
    remedy = "see its log; a faster way for its weights: hub.weight_deltas=always, or sgpo-async actor --weights-by"
    return Advisory("warning", "Actors serve old weights", evidence, remedy)


RULES: tuple[Rule, ...] = (
    stalled,
    wrong_weights,
    mismatched,
    quarantined,
    rejected,
    restarted,
    trainer_idle,
    engines_idle,
    storing,
    dropped,
    clipped,
    spiked,
    collapsed,
    no_signal,
    useless_strategies,
    cut_rollouts,
    late_weights,
)

"""Throughput and staleness of a run in closed form: which side limits it, and how old its tokens are.

With B problems a step, eta the largest lag, S rollouts a problem, completions of mean length L, s(n) the time of a
decoding step with n sequences, T the learner's time from a batch to its commit, and d the time until the engines have
the new weights, the time of a step is the longest of three:

    generation   B S (L s(n) / n + prefill) / nodes, with n: what slots and memory allow on each node
    learner      T, and what it does between steps
    staleness    The hub begins B groups at each commit, under the new weights, and eta B others are unfinished when a
                 batch is formed. A group takes D = d + (its longest completion) s(n). Of the groups begun j steps
                 before the last commit, the share P(D > (j + 1) step - T) is unfinished, so the step solves
                     sum over j >= 0 of P(D > (j + 1) step - T) = eta

If two of them are nearly equal, the step is longer than either, since neither side always has a reserve; `_blended`
adds them with exponents that were fitted to simulated runs. At eta = 0, staleness is the time of the longest rollout of
a batch, and T. There n falls while the batch is generated, so the decoding steps are added up one by one.

A group begun at a commit is trained in the first batch that is formed after its end, or eta batches later if the
learner limits the run and the engines had time to fill the buffer. The lag of a token is the number of commits between.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from sgpo_async.hub.balance import balance
from sgpo_async.simulation.rates import Lengths
from sgpo_async.simulation.workload import Workload
from sgpo_async.simulation.world import Settings

Limit = Literal["generation", "learner", "staleness", "turns"]
TASKS = 2000  # of which the lengths are averaged
SLACK = 0.3  # engines that are so much faster than the learner fill the buffer within the run
BLEND_ENGINES, BLEND_SIDES = 4, 6  # fitted to 80 simulated runs: docs/performance.md


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the closed form says."""

    limit: Limit
    step_s: float
    tokens_per_s: float
    mean_lag: float
    sequences: float  # that run on a node
    steps: dict[Limit, float]  # seconds of a step that each side allows


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the completions of many tasks."""

    lengths: np.ndarray  # [tasks, size]
    longest: np.ndarray  # [tasks], of each group
    mean: float
    square: float  # mean of the squares
    trained: float  # tokens of a forward and backward of a problem, mean


def predict(settings: Settings) -> Prediction:
    """The prediction for these settings."""
    found = moments(settings)
    train_s, between_s = _train_s(settings, found)
    most = _most_sequences(settings, found)
    steps: dict[Limit, float] = {"learner": train_s + between_s}
    if settings.max_lag == 0:
        steps["turns"] = _makespan(settings, found) + _delay_s(settings) + train_s
        sequences = most
    else:
        steps["generation"] = settings.problems / _generation(settings, found, most)
        sequences, steps["staleness"] = _staleness(settings, found, most, train_s, max(steps.values()))
    limit = max(steps, key=lambda one: steps[one])
    step_s = steps[limit] if settings.max_lag == 0 else _blended(steps)
    return Prediction(
        limit=limit,
        step_s=step_s,
        tokens_per_s=settings.problems * settings.size * found.mean / step_s,
        mean_lag=_lag(settings, found, steps, _decode_s(settings, found, sequences), step_s, train_s),
        sequences=sequences,
        steps=steps,
    )


def _blended(steps: dict[Limit, float]) -> float:
    """Seconds of a step: the longest of the limits, and more where two are close."""
    engines = (steps["generation"] ** BLEND_ENGINES + steps["staleness"] ** BLEND_ENGINES) ** (1 / BLEND_ENGINES)
    return float((engines**BLEND_SIDES + steps["learner"] ** BLEND_SIDES) ** (1 / BLEND_SIDES))


def _staleness(settings: Settings, found: Moments, most: float, train_s: float, at_least: float) -> tuple[float, float]:
    """Sequences that run on a node, and the time of a step that the largest lag allows."""
    sequences, step_s = most, at_least
    for _ in range(30):
        decode_s = _decode_s(settings, found, sequences)
        ends = np.sort(found.longest * decode_s + _delay_s(settings))
        step_s = _solve(ends, train_s, settings.max_lag, settings.problems)
        running = settings.problems * settings.size * found.mean * decode_s / max(step_s, at_least) / settings.nodes
        sequences = 0.5 * (sequences + max(1.0, min(most, running)))
    return sequences, step_s


def _solve(ends: np.ndarray, train_s: float, lag: int, batch: int) -> float:
    """The step at which as many groups are unfinished as the largest lag allows; by bisection."""
    low, high = 1e-9, float(ends[-1]) + train_s
    for _ in range(60):
        middle = (low + high) / 2
        ages = np.arange(1, int(ends[-1] / middle) + 3) * middle - train_s
        unfinished = float((1 - np.searchsorted(ends, ages, side="right") / len(ends)).sum())
        low, high = (middle, high) if unfinished > max(lag, 0.5 / batch) else (low, middle)
    return high


def _delay_s(settings: Settings) -> float:
    """From a commit until the engines have its weights."""
    return settings.learner.arrive_s + settings.engine.load_s


def moments(settings: Settings) -> Moments:
    """Of the completions of the first tasks."""
    return _moments(settings.lengths, settings.autonomous, settings.guided, settings.seed)


@lru_cache(maxsize=16)
def _moments(of: Lengths, autonomous: int, guided: int, seed: int) -> Moments:
    size = autonomous + guided
    work = Workload(of, size=size, seed=seed)
    lengths = np.array([[work.length(task, slot) for slot in range(size)] for task in range(TASKS)], float)
    own = lengths[:, :autonomous].sum(axis=1) + autonomous * of.prompt
    target = np.zeros(TASKS)
    for task in range(TASKS):
        for slot in range(autonomous, size):
            if work.correct(task, slot, guided=True):
                target[task] = (4 / 3) * (of.prompt + of.strategy + lengths[task, slot])
                break
    return Moments(
        lengths=lengths,
        longest=lengths.max(axis=1),
        mean=float(lengths.mean()),
        square=float((lengths**2).mean()),
        trained=float((own + target).mean()),
    )


def _train_s(settings: Settings, found: Moments) -> tuple[float, float]:
    """Seconds from a batch to its commit, and from there to the next request."""
    learner = settings.learner
    tokens = settings.problems * found.trained / learner.ranks * _imbalance(settings, found)
    checkpoints = learner.checkpoint_s / learner.checkpoint_every if learner.checkpoint_every else 0.0
    return tokens * learner.token_s + learner.step_s + 2 * learner.switch_s, learner.publish_s + checkpoints


def _imbalance(settings: Settings, found: Moments) -> float:
    """Tokens of the rank with the most over the mean, as the hub divides batches among ranks."""
    ranks, batch = settings.learner.ranks, settings.problems
    tokens, ratios = found.lengths.sum(axis=1), []
    for first in range(0, min(TASKS, 20 * batch) - batch + 1, batch):
        own = tokens[first : first + batch]
        loads = [own[list(share)].sum() for share in balance(own.tolist(), ranks)]
        ratios.append(max(loads) / np.mean(loads))
    return float(np.mean(ratios)) if ratios else 1.0


def _context(found: Moments, settings: Settings) -> float:
    """Mean tokens that a running sequence holds: sampling by time favours long ones."""
    lengths = settings.lengths
    prompt = lengths.prompt + lengths.strategy * settings.guided / settings.size
    return prompt + found.square / (2 * found.mean)


def _most_sequences(settings: Settings, found: Moments) -> float:
    """Sequences that run on a node at once: slots, or memory."""
    return min(settings.engine.slots, max(1.0, 0.95 * settings.engine.capacity / _context(found, settings)))


def _decode_s(settings: Settings, found: Moments, sequences: float) -> float:
    """Seconds of a decoding step with so many sequences on a node."""
    return settings.engine.step_s(sequences, sequences * _context(found, settings))


def _generation(settings: Settings, found: Moments, sequences: float) -> float:
    """Problems per second that all nodes generate with so many sequences each."""
    engine, lengths = settings.engine, settings.lengths
    step_s = _decode_s(settings, found, sequences)
    prompts = lengths.prompt * bool(settings.autonomous) + (lengths.prompt + lengths.strategy) * bool(settings.guided)
    seconds = settings.size * found.mean * step_s / sequences + prompts * engine.prefill_s
    return settings.nodes / seconds


def _makespan(settings: Settings, found: Moments) -> float:
    """Seconds in which the nodes generate one batch that begins at once."""
    engine = settings.engine
    count = settings.problems * settings.size / settings.nodes
    slots = _most_sequences(settings, found)
    first = 0.0
    if count > slots:  # the slots are full until the queue is empty
        rate = _generation(settings, found, slots) * settings.size / settings.nodes
        first, count = (count - slots) / rate, slots
    ends = np.sort(found.lengths.ravel())
    grid = np.unique(np.concatenate(([0.0], np.quantile(ends, np.linspace(0, 1, 200)))))
    alive = 1 - np.searchsorted(ends, grid, side="right") / len(ends)
    # Of `count` sequences, the longest is about the quantile 1 - 1/count: beyond it nothing runs any more.
    last = float(np.quantile(ends, max(0.0, 1 - 0.6 / max(count * settings.nodes, 1))))
    seconds = 0.0
    for start, end, share in zip(grid[:-1], grid[1:], alive[:-1], strict=True):
        if start >= last:
            break
        running = max(1.0, count * share)
        context = running * (settings.lengths.prompt + (start + end) / 2)
        seconds += (min(end, last) - start) * engine.step_s(running, context)
    return first + seconds


def _lag(
    settings: Settings,
    found: Moments,
    steps: dict[Limit, float],
    decode_s: float,
    step_s: float,
    train_s: float,
) -> float:
    """Mean lag of a trained token."""
    if settings.max_lag == 0:
        return 0.0
    first = max(step_s - train_s, 0.0)  # from a commit to the next batch
    ends = found.longest * decode_s + _delay_s(settings)
    batches = np.maximum(0, np.ceil((ends - first) / step_s))
    slack = steps["learner"] / max(steps["generation"], steps["staleness"]) - 1
    full = min(1.0, max(0.0, slack / SLACK))  # how far the buffer is filled
    batches = np.maximum(batches, full * settings.max_lag)
    # Versions that arrive while a completion is generated, summed over its tokens.
    per_version = step_s / decode_s
    whole = np.floor(found.lengths / per_version)
    newer = per_version * whole * (whole - 1) / 2 + whole * (found.lengths - whole * per_version)
    lag = batches[:, None] * found.lengths - newer
    return float(lag.sum() / found.lengths.sum())

"""Lengths and rewards of rollouts. They belong to the task and the slot, so every setting has the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from sgpo_async.simulation.rates import Lengths


class Workload:
    """Draws lengths and rewards by task and slot, whatever the order in which they are asked for."""

    def __init__(self, lengths: Lengths, *, size: int, seed: int) -> None:
        """`size` rollouts of each task."""
        self.lengths, self._size, self._seed = lengths, size, seed
        self._recorded = np.sort(np.array(lengths.recorded, np.int64))
        self._of_task = lru_cache(maxsize=65_536)(self._draw)

    def length(self, task: int, slot: int) -> int:
        """Tokens of a completion, in [1, longest]."""
        return int(self._of_task(task)[0][slot])

    def correct(self, task: int, slot: int, *, guided: bool) -> bool:
        """Whether a rollout is correct. One that was cut is not."""
        lengths, luck = self._of_task(task)
        share = self.lengths.guided_correct if guided else self.lengths.correct
        return bool(luck[slot] < share and lengths[slot] < self.lengths.longest)

    def _draw(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng((self._seed, abs(task), int(task < 0)))
        normal = (random.standard_normal(self._size) + random.standard_normal()) / math.sqrt(2)
        if len(self._recorded):
            shares = np.array([NormalDist().cdf(one) for one in normal])
            lengths = self._recorded[np.minimum((shares * len(self._recorded)).astype(int), len(self._recorded) - 1)]
        else:
            lengths = np.exp(math.log(self.lengths.median) + self.lengths.sigma * normal)
        return np.clip(lengths, 1, self.lengths.longest).astype(np.int64), random.random(self._size)


def median_of(mean: float, sigma: float, longest: int) -> float:
    """The median of lognormal lengths that, cut at `longest`, have this mean. Found by bisection."""
    low, high = 1e-3, float(longest) * 100
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _cut_mean(middle, sigma, longest) < mean else (low, middle)
    return low


def _cut_mean(median: float, sigma: float, longest: int) -> float:
    """Mean of min(X, longest) for a lognormal X."""
    z = (math.log(longest) - math.log(median)) / sigma
    below = math.exp(math.log(median) + sigma * sigma / 2) * NormalDist().cdf(z - sigma)
    return below + longest * (1 - NormalDist().cdf(z))


def recorded_lengths(samples: Sequence[dict[str, object]]) -> tuple[int, ...]:
    """The lengths in the lines of samples.jsonl, of all rollouts."""
    found: list[int] = []
    for line in samples:
        rollouts = line.get("rollouts")
        assert isinstance(rollouts, list)
        found += [int(one["tokens"]) for one in rollouts]
    return tuple(found)

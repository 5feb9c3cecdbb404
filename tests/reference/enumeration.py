"""Exact expectations over all sequences of a small vocabulary, under policies that are tables.

A table holds one distribution per prefix: table[prefix] is a [V] array of next-token probabilities.
"""

import itertools
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Table = dict[tuple[int, ...], Array]
Sequence = tuple[int, ...]


def random_table(rng: np.random.Generator, vocabulary: int, horizon: int, spread: float = 1.0) -> Table:
    table = {}
    for length in range(horizon):
        for prefix in itertools.product(range(vocabulary), repeat=length):
            weights = np.exp(spread * rng.standard_normal(vocabulary))
            table[prefix] = weights / weights.sum()
    return table


def sequences(vocabulary: int, horizon: int) -> list[Sequence]:
    return list(itertools.product(range(vocabulary), repeat=horizon))


def token_probabilities(table: Table, sequence: Sequence) -> Array:
    """Return the probability of each token given the tokens before it: [T]."""
    return np.array([table[sequence[:t]][token] for t, token in enumerate(sequence)])


def prefix_kl(p: Table, q: Table, sequence: Sequence) -> Array:
    """Compute KL(p || q) of the next token after each prefix of the sequence: [T]."""
    prefixes = [sequence[:t] for t in range(len(sequence))]
    return np.array([sum(a * np.log(a / b) for a, b in zip(p[s], q[s], strict=True)) for s in prefixes])


def expectation(table: Table, every: list[Sequence], value: Callable[[Sequence], float]) -> float:
    """Compute E[value(o)] for sequences o sampled from the table."""
    return sum(float(np.prod(token_probabilities(table, o))) * value(o) for o in every)

"""Completions that are cut at random positions and continued elsewhere follow the model's distribution.

Chi-square over all completions of a tiny model: they end with END or after HORIZON tokens, and are enumerated.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from engines_models import drain, engine_of, prompts_of, tiny

from sgpo_async.engines import Generate
from tests.reference import enumeration

VOCABULARY, HORIZON, END = 4, 4, 3
SAMPLES = 6000
PROMPT = prompts_of([3], vocabulary=VOCABULARY)[0]
CUTS = np.random.default_rng(0).integers(1, HORIZON, SAMPLES)  # tokens of each sample that the first engine samples


def policy(seed):
    return tiny("qwen2", vocabulary=VOCABULARY, seed=seed, spread=0.5)


@torch.no_grad()
def table_of(model):
    """The next token's distribution after each prefix, from the model's plain forward."""
    table = {}
    for length in range(HORIZON):
        for prefix in itertools.product(range(VOCABULARY), repeat=length):
            ids = torch.tensor([[*PROMPT.tolist(), *prefix]])
            table[prefix] = torch.softmax(model(ids, use_cache=False).logits[0, -1].double(), -1).numpy()
    return table


def distribution(table):
    """The probability of each completion."""
    total = Counter()
    for sequence in enumeration.sequences(VOCABULARY, HORIZON):
        length = sequence.index(END) + 1 if END in sequence else HORIZON
        total[sequence[:length]] += float(np.prod(enumeration.token_probabilities(table, sequence)))
    return total


def switched(first, second, cut):
    """`first` gives the first `cut` tokens, `second` the others."""
    return {prefix: (first if len(prefix) < cut else second)[prefix] for prefix in first}


def cut_and_continue(first, second):
    """The completions of all samples: each moves from `first` to `second` at its cut, unless it has ended before."""
    asked = [
        Generate(id=id, prompt=PROMPT, max_new_tokens=HORIZON, temperature=1.0, seed=id) for id in range(SAMPLES)
    ]  # fmt: skip
    for request in asked:
        first.submit(request)
    completions = {}
    while first.load_status().running or first.load_status().waiting:
        completions |= {result.id: result for result in first.step(0.0)}
        progress = first.progress(range(SAMPLES))
        moves = {id: prefix for id, prefix in progress.items() if prefix.tokens.size == CUTS[id]}
        first.cancel(moves)
        for id, prefix in moves.items():
            second.submit(replace(asked[id], prefix=prefix))
    assert second.load_status().waiting > SAMPLES / 2
    completions |= drain(second)
    assert len(completions) == SAMPLES
    return Counter(tuple(result.tokens.tolist()) for result in completions.values())


def excess(counts, expected):
    """Pearson's chi-square divided by its 0.999 quantile after Wilson and Hilferty; rare completions are one cell."""
    assert counts.keys() <= expected.keys()
    pairs = [(counts[completion], SAMPLES * p) for completion, p in expected.items()]
    cells = [pair for pair in pairs if pair[1] >= 5]
    if rare := [pair for pair in pairs if pair[1] < 5]:
        cells.append((sum(n for n, _ in rare), sum(e for _, e in rare)))
    degrees = len(cells) - 1
    assert degrees > 50
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    return sum((n - e) ** 2 / e for n, e in cells) / bound


def engine(seed):
    return engine_of(policy(seed), slots=64, end_ids=[END], version=seed)


def test_continuations_under_the_same_weights_follow_the_model():
    counts = cut_and_continue(engine(0), engine(0))
    found = excess(counts, distribution(table_of(policy(0))))
    assert found < 1


def test_continuations_under_other_weights_follow_the_first_model_before_the_cut_and_the_second_after_it():
    first, second = table_of(policy(0)), table_of(policy(1))
    counts = cut_and_continue(engine(0), engine(1))
    mixture = Counter()
    for cut, samples in Counter(CUTS.tolist()).items():
        for completion, p in distribution(switched(first, second, cut)).items():
            mixture[completion] += p * samples / SAMPLES
    found = [excess(counts, expected) for expected in (mixture, distribution(first), distribution(second))]
    assert found[0] < 1 and min(found[1:]) > 2, found

"""How fast simulated engines and learners are: the stated model behind every simulated second.

Decoding reads the weights once, and the keys and values of all sequences, for one token of each sequence; with many
sequences it is limited by arithmetic instead. One step of `n` sequences that hold `c` tokens together takes

    s(n, c) = max(a + b c, n h)      a: weights / bandwidth + overhead, b: keys and values of a token / bandwidth,
                                     h: arithmetic of one token

A prompt is computed once for its group, with arithmetic alone, and stops decoding meanwhile. A learner's step takes as
long as its slowest rank, plus a part that does not depend on the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineRates:
    """One engine: an inference node with its GPUs."""

    slots: int  # sequences decoded together, at most
    base_s: float  # a: of a decoding step
    context_s: float  # b: of each token that the sequences hold
    compute_s: float = 0.0  # h: of each sequence in a step
    prefill_s: float = 0.0  # of each token of a prompt
    capacity: float = math.inf  # tokens whose keys and values fit
    load_s: float = 0.0  # for how long an update stops it

    def step_s(self, sequences: float, context: float) -> float:
        """Seconds of one decoding step."""
        return max(self.base_s + self.context_s * context, sequences * self.compute_s)

    def seconds(self, steps: float, sequences: int, context: float) -> float:
        """Seconds of `steps` decoding steps, in which each of the sequences grows by a token a step."""
        grows = self.context_s * sequences
        memory = self.base_s + self.context_s * context
        compute = sequences * self.compute_s
        before = min(steps, max(0.0, (compute - memory) / grows)) if grows else (steps if compute > memory else 0.0)
        after = steps - before
        return before * compute + after * (memory + grows * before) + grows * after * after / 2

    def steps(self, seconds: float, sequences: int, context: float) -> float:
        """The inverse of `seconds`: how many decoding steps fit into this time."""
        grows = self.context_s * sequences
        memory = self.base_s + self.context_s * context
        compute = sequences * self.compute_s
        before = max(0.0, (compute - memory) / grows) if grows else (math.inf if compute > memory else 0.0)
        if before and seconds <= before * compute:
            return seconds / compute
        rest, slope = seconds - (before * compute if before else 0.0), memory + grows * before
        if not grows:
            return before + rest / slope
        # The root of grows/2 k^2 + slope k = rest, in a form that does not subtract nearly equal numbers.
        return before + 2 * rest / (slope + math.sqrt(slope * slope + 2 * grows * rest))


@dataclass(frozen=True, kw_only=True)
class LearnerRates:
    """The learner: `ranks` GPUs that train one step together."""

    ranks: int
    token_s: float  # of a rank, for each trained token (forward and backward)
    step_s: float = 0.0  # of a step, whatever its tokens: the optimiser, the first gather
    publish_s: float = 0.0  # for how long a publication stops training
    arrive_s: float = 0.0  # from the publication until the engines can load the version
    checkpoint_s: float = 0.0
    checkpoint_every: int = 0  # steps; 0: never
    switch_s: float = 0.0  # before and after a step on GPUs that also generate


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of prompts and completions in tokens, and how often rollouts are correct.

    Completions are lognormal and cut at `longest`, or drawn from `recorded`. Half of the variance of the logarithm
    belongs to the problem.
    """

    longest: int
    median: float = 400.0
    sigma: float = 1.2
    prompt: int = 150
    strategy: int = 150
    correct: float = 0.5
    guided_correct: float = 0.7
    recorded: tuple[int, ...] = field(default=(), repr=False)

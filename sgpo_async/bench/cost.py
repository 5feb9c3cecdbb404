"""The GPU-hours of a run, calculated from its configuration, measured throughput and stated assumptions.

    python -m sgpo_async.bench.cost CONFIG [key=value ...] --generate-tokens-per-s R --train-tokens-per-s R ...

With P problems a step, S steps, completions of c tokens and prompts of p:

    warm-up     epochs (n (p + r) + v (p + r)/3)                    trained tokens; r of a response, n + v problems
    RL          S P (G1 + G2) c + rounds held_out samples 2 c       generated tokens, own evaluation included
                S P (G1 (p + c) + k (p + c) + k (p + s + c)/3)      trained tokens; k targets a problem, s of a strategy
    evaluation  sum over benchmarks of problems k c                 generated tokens

A trained token is one forward and one backward, which cost three forwards; a forward alone, as a teacher's or of a
validation, is a third. Throughput is that of one GPU, measured with the run's own settings, and taken to grow with the
number of GPUs. Asynchronously the slower side sets the time of RL; at hub.max_lag=0 the sides take turns.

Not counted: prompts in the engine (computed once for a group), scores of targets (Eq. 4), starts, checkpoints, stops.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sgpo_async.config import Run, load
from sgpo_async.config.schema import require
from sgpo_async.errors import ConfigError, SgpoError

FORWARD = 1 / 3  # of a forward and a backward
HOUR_S = 3600.0

# Problems and samples of the paper's protocol; of OlympiadBench the open-ended English mathematics without pictures.
PAPER_BENCHMARKS = {"MATH500": (500, 4), "AMC23": (40, 32), "OlympiadBench": (675, 4), "AIME24": (30, 32)}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the configuration does not contain. Both rates are tokens per second of one GPU."""

    generate_tokens_per_s: float
    train_tokens_per_s: float
    completion_tokens: float  # mean over a run; evaluation too
    prompt_tokens: int = 150
    strategy_tokens: float = 150
    response_tokens: float = 1500  # of the warm-up
    sft_problems: int = 2550  # nine tenths of a third of 8,500
    sft_validation: int = 283
    target_share: float = 1.0  # of problems with a correct guided rollout; 1 is an upper bound
    benchmarks: Mapping[str, tuple[int, int]] = field(default_factory=lambda: PAPER_BENCHMARKS)

    def __post_init__(self) -> None:
        for name in ("generate_tokens_per_s", "train_tokens_per_s", "completion_tokens"):
            require(getattr(self, name) > 0, _option(name), "must be > 0", getattr(self, name))
        for name in ("prompt_tokens", "strategy_tokens", "response_tokens", "sft_problems", "sft_validation"):
            require(getattr(self, name) >= 0, _option(name), "must be >= 0", getattr(self, name))
        require(0 <= self.target_share <= 1, "--target-share", "must be in [0, 1]", self.target_share)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the run. All of its `gpus` are reserved for its whole duration."""

    name: str
    generated: float  # tokens
    trained: float  # tokens of a forward and a backward
    seconds: float
    gpus: int

    @property
    def gpu_hours(self) -> float:
        """The cost of the stage."""
        return self.seconds * self.gpus / HOUR_S


def estimate(run: Run, given: Assumptions) -> list[Stage]:
    """The stages warm-up, RL and evaluation. Raises ConfigError for an objective whose cost is not modelled."""
    require(
        run.algorithm.objective in ("sgpo", "grpo"),
        "algorithm.objective",
        "must be sgpo or grpo: the cost of other objectives is not modelled",
        run.algorithm.objective,
    )
    engines = run.local.actors * (
        run.engine.sglang.servers * run.engine.sglang.tp if run.engine.kind == "sglang" else 1
    )
    learners = run.local.ranks
    generate, train = given.generate_tokens_per_s * engines, given.train_tokens_per_s * learners
    warm_up = run.sft.epochs * (given.sft_problems + FORWARD * given.sft_validation)
    warm_up *= given.prompt_tokens + given.response_tokens
    generated, trained = rl_generated(run, given), rl_trained(run, given)
    sides = (generated / generate, trained / train)
    seconds = sum(sides) if run.hub.max_lag == 0 else max(sides)
    evaluated = given.completion_tokens * sum(problems * k for problems, k in given.benchmarks.values())
    return [
        Stage(name="warm-up", generated=0, trained=warm_up, seconds=warm_up / train, gpus=learners),
        Stage(name="RL", generated=generated, trained=trained, seconds=seconds, gpus=learners + engines),
        Stage(name="evaluation", generated=evaluated, trained=0, seconds=evaluated / generate, gpus=engines),
    ]


def rl_generated(run: Run, given: Assumptions) -> float:
    """Tokens that the engines generate: rollouts, and held-out problems without and with their strategies."""
    rollouts = run.steps * run.rollouts_per_step
    rounds = math.ceil(run.steps / run.evaluation.every) + 1
    return given.completion_tokens * (rollouts + rounds * run.tasks.held_out * run.evaluation.samples * 2)


def rl_trained(run: Run, given: Assumptions) -> float:
    """Tokens that the learner trains; a forward without a backward counts as a third."""
    algorithm, rollout = run.algorithm, run.rollout
    plain = given.prompt_tokens + given.completion_tokens
    guided = plain + given.strategy_tokens
    tokens = rollout.autonomous * plain if algorithm.policy_gradient else 0.0
    if algorithm.objective == "sgpo":
        targets = given.target_share * (1 if algorithm.target == "reachable" else rollout.guided)
        tokens += targets * plain
        if algorithm.divergence != "sft":
            tokens += FORWARD * targets * guided
        if algorithm.pass_rates == "corrected":
            tokens += FORWARD * (rollout.autonomous * plain + rollout.guided * guided)
    return run.steps * run.learner.problems_per_step * tokens


def table(stages: Sequence[Stage]) -> str:
    """The stages and their sum, as text."""
    lines = [f"{'':12}{'generated':>12}{'trained':>12}{'hours':>8}{'GPUs':>6}{'GPU-hours':>11}"]
    for one in stages:
        tokens = f"{one.generated / 1e6:>10,.0f} M{one.trained / 1e6:>10,.0f} M"
        lines.append(f"{one.name:12}{tokens}{one.seconds / HOUR_S:>8.1f}{one.gpus:>6}{one.gpu_hours:>11.1f}")
    hours, total = sum(one.seconds for one in stages) / HOUR_S, sum(one.gpu_hours for one in stages)
    lines.append(f"{'all':12}{'':24}{hours:>8.1f}{'':6}{total:>11.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and return 0; after a mistake of the user print one line and return 2."""
    parser = argparse.ArgumentParser(prog="python -m sgpo_async.bench.cost", description="GPU-hours of a run.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. builtin:paper-qwen2.5-7b")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="laid over it")
    parser.add_argument("--generate-tokens-per-s", type=float, required=True, metavar="R", help="of one GPU")
    parser.add_argument("--train-tokens-per-s", type=float, required=True, metavar="R", help="of one GPU")
    parser.add_argument("--completion-tokens", type=float, required=True, metavar="N", help="mean")
    for name in ("prompt_tokens", "strategy_tokens", "response_tokens", "target_share"):
        default = getattr(Assumptions, name)
        parser.add_argument(_option(name), type=float, default=default, metavar="N", help="default: %(default)g")
    for name in ("sft_problems", "sft_validation"):
        default = getattr(Assumptions, name)
        parser.add_argument(_option(name), type=int, default=default, metavar="N", help="default: %(default)d")
    parser.add_argument(
        "--benchmark", action="append", metavar="NAME=PROBLEMSxK", help="may be repeated (default: the paper's four)"
    )
    words = vars(parser.parse_intermixed_args(argv))
    try:
        run = load(words.pop("config"), words.pop("overrides"))
        benchmarks = dict(map(_benchmark, words.pop("benchmark") or [])) or PAPER_BENCHMARKS
        print(table(estimate(run, Assumptions(**words, benchmarks=benchmarks))))
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _benchmark(word: str) -> tuple[str, tuple[int, int]]:
    name, _, size = word.partition("=")
    problems, _, samples = size.partition("x")
    if not (name and problems.isdecimal() and samples.isdecimal()):
        raise ConfigError(f"--benchmark {word!r}: looks like NAME=PROBLEMSxK, e.g. AIME24=30x32")
    return name, (int(problems), int(samples))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(main())

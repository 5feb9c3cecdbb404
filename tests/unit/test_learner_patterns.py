"""Patterns in completions, and the divergence by classes of tokens."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sgpo_async.config import load
from sgpo_async.config.schema import Correction, Learner
from sgpo_async.errors import ConfigError
from sgpo_async.learner.contexts import InContext
from sgpo_async.learner.patterns import MOST, Patterns
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.step_metrics import Distilled
from sgpo_async.wire.records import OBSERVED, Rollout
from tests.reference import learner_cases as cases

WORDS = ("<eos>", "a", "hint", "7", "12", "so")
TOKENIZER: Any = SimpleNamespace(
    decode=lambda tokens, skip_special_tokens=False: " ".join(
        WORDS[token] for token in tokens if not (skip_special_tokens and token == 0)
    )
)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    join_alone()
    yield
    dist.destroy_process_group()


def rollout(
    *tokens: int,
    task: int = 0,
    guided: bool = False,
    prompt: tuple[int, ...] = (1,),
    observed: tuple[int, int] | None = None,
) -> Rollout:
    """A rollout whose tokens from `observed[0]` to `observed[1]` an environment wrote."""
    start, end = observed or (len(tokens), len(tokens))
    spans = [(0, start), (OBSERVED, end), (0, len(tokens))] if observed else [(0, len(tokens))]
    return Rollout(
        task=task,
        attempt=0,
        slot=0,
        purpose="train",
        guided=guided,
        prompt=np.array(prompt, np.int32),
        tokens=np.array(tokens, np.int32),
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.array([version for version, _ in spans], np.int32),
        digests=np.zeros(len(spans), np.int64),
        ends=np.array([end for _, end in spans], np.int32),
        reward=0.0,
        finish="stop",
    )


def test_the_share_of_autonomous_completions_in_which_a_pattern_is_found() -> None:
    found = Patterns(Learner(patterns={"leak": r"\bhint\b", "ends": "so$"}), TOKENIZER)
    found.see([rollout(1, 2, 0), rollout(2, 5, 0, guided=True), rollout(1, 5, 0)])
    found.see([rollout(3, 0), rollout(1, 2, 5, 0, observed=(1, 2))])
    # The last one's hint is an environment's. Its end, like that of the third, is followed by the end token alone.
    assert found.reduce([]) == {"patterns": {"leak": 1 / 4, "ends": 2 / 4}, "quotes": {}, "kl_classes": {}}
    assert found.reduce([])["patterns"] == {}, "nothing was seen since"


def test_of_many_completions_evenly_chosen_ones_are_decoded() -> None:
    decoded: list[int] = []

    def decode(tokens: np.ndarray, **_: Any) -> str:
        decoded.append(int(tokens[0]))
        return ""

    found = Patterns(Learner(patterns={"any": "x"}), SimpleNamespace(decode=decode))
    found.see([rollout(number, 0) for number in range(1000)])
    assert len(decoded) == MOST
    assert decoded[0] == 0 and decoded[-1] == 999
    assert {int(gap) for gap in np.diff(decoded)} <= {15, 16}


SAY_7, SAY_12 = (1, 2, 3), (1, 2, 4)  # "a hint 7", "a hint 12"


def test_the_share_of_autonomous_completions_that_quote_a_context() -> None:
    # Two words in a row. Both problems end with "so 7"; their contexts say "a hint 7" and "a hint 12" before it.
    found = Patterns(Learner(quoted_words=2), TOKENIZER)
    found.see(
        [
            rollout(*SAY_7, guided=True, prompt=(*SAY_7, 5, 3)),
            rollout(2, 3, prompt=(5, 3)),  # quotes its own: "hint 7"
            rollout(1, 2, prompt=(5, 3)),  # ... and what both contexts say: "a hint"
            rollout(5, 3, 2, 4, prompt=(5, 3)),  # ... the other one: "hint 12"; "so 7" is in its own prompt
            rollout(2, 2, prompt=(5, 3)),  # neither
            rollout(2, 4, task=1, prompt=(5, 3)),  # its own
            rollout(*SAY_12, task=1, guided=True, prompt=(*SAY_12, 5, 3)),
            rollout(1, 2, task=2),  # has no context
        ]
    )
    assert found.reduce([])["quotes"] == {"own": 3 / 5, "other": 2 / 5}
    assert found.reduce([])["quotes"] == {}, "nothing was seen since"
    found.see([rollout(1, 2, prompt=(5, 3)), rollout(*SAY_7, guided=True, prompt=(*SAY_7, 5, 3))])
    assert found.reduce([])["quotes"] == {"own": 1.0}, "there is no other problem"


def test_quotes_of_a_context_that_only_the_teacher_reads() -> None:
    found = Patterns(Learner(quoted_words=2), TOKENIZER)

    def contexts(group: list[Rollout]) -> dict[int, InContext]:
        return {group[0].slot: InContext(np.array([*SAY_7, 5], np.int32))} if group[0].task == 0 else {}

    found.see([rollout(2, 3, prompt=(5,)), rollout(2, 3, task=1, prompt=(5,))], contexts)  # type: ignore[arg-type]
    assert found.reduce([])["quotes"] == {"own": 1.0}


def test_the_divergence_of_each_class_is_the_mean_over_its_trained_tokens() -> None:
    classes = {"numbers": r"\d+", "seven": "7", "hints": "hint"}
    found = Patterns(Learner(token_classes=classes), TOKENIZER)
    kept = torch.zeros(3, dtype=torch.bool)
    distilled = [
        Distilled(rollout(3, 2, 1), torch.tensor([0.5, 2.0, 0.25]), kept),
        Distilled(rollout(4, 2, 0), torch.tensor([1.5, math.nan, 0.75]), kept),
    ]
    # "7" belongs to the first class that it matches, and so "seven" has no token; the second hint is not trained.
    assert found.reduce(distilled) == {
        "patterns": {},
        "quotes": {},
        "kl_classes": {"numbers": 1.0, "hints": 2.0, "other": 0.5},
    }


@pytest.mark.parametrize("objective", ["sgpo", "pi-distill"])
def test_a_step_measures_what_it_has_trained_on(objective: Any) -> None:
    """pi-Distill distils each rollout twice, by two divergences: all of its tokens count twice."""
    run = cases.settings(objective=objective, kl_correction=Correction(mode="none", bound=1.0))
    learner = replace(run.learner, patterns={"all": "", "none": "!"}, token_classes={"even": "[02468]"})
    stepper = cases.stepper(replace(run, learner=learner), cases.tiny_model())
    stepper.patterns = Patterns(learner, SimpleNamespace(decode=lambda tokens, **_: str(tokens[0] % 10)))
    metrics = stepper.update(cases.shard_of(cases.groups(seed=0), problems=4))
    assert metrics["patterns"] == {"all": 1.0, "none": 0.0}
    assert stepper.statistics is not None
    pairs = [
        (token, d)
        for one in stepper.statistics.distilled
        for token, d in zip(one.rollout.tokens.tolist(), one.d.tolist(), strict=True)
    ]
    assert pairs
    even = [d for token, d in pairs if token % 2 == 0]
    odd = [d for token, d in pairs if token % 2]
    assert metrics["kl_classes"] == pytest.approx({"even": np.mean(even), "other": np.mean(odd)})
    total = sum(d for _, d in pairs) / len(pairs)
    assert metrics["kl_mean"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("learner.patterns={leak: '('}", "learner.patterns.leak must be a regular expression"),
        ('learner.patterns={leak: "\\bhint"}', "write each backslash twice, got '\\x08hint'"),
        ("learner.token_classes={a b: x}", "learner.token_classes must have names of letters"),
        ("learner.quoted_words=-1", "learner.quoted_words must be >= 0, got -1"),
        ("learner.token_classes={other: x}", "learner.token_classes must have no class named other"),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("", [override])
    assert text in str(refused.value)


def test_a_prompt_without_a_text_of_its_own_cannot_be_quoted() -> None:
    overrides = ["algorithm.objective=sdpo", "tasks.context=sibling", "rollout.guided=0", "learner.quoted_words=3"]
    with pytest.raises(ConfigError, match="learner.quoted_words must be 0 with tasks.context=sibling: .* got 3"):
        load("", overrides)

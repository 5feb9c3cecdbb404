"""Contexts of problems (`tasks.context`), and the prompts with which a teacher reads autonomous rollouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgpo_async.config import builtin_names, load
from sgpo_async.config.schema import Algorithm, Rlcsd, Run, Tasks
from sgpo_async.config.schema import Rollout as Sizes
from sgpo_async.errors import ConfigError
from sgpo_async.learner.contexts import Contexts
from sgpo_async.learner.sft import supervised
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.prompts import ASKED, build_prompt, chat
from sgpo_async.tasks.sources import open_source, source_of
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Rollout
from tests.reference import learner_cases as cases

GUIDING = ["response", "partial-response", "answer", "other-strategy"]
METHODS = [name for name in builtin_names() if name.startswith("builtin:methods/")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_folder("builtin:cues"))


def run_of(context: str, objective: str = "opsd", **algorithm: object) -> Run:
    return Run(
        tasks=Tasks(context=context),
        rollout=Sizes(autonomous=4, guided=0),
        algorithm=Algorithm(objective=objective, **algorithm),
    )


def group_of(run: Run, tokenizer: Any, rewards: list[float], *, cut: tuple[int, ...] = ()) -> list[Rollout]:
    """The autonomous rollouts of task 0, each the words of another problem."""
    source = source_of(run)
    problem = source.training(0)
    prompt = np.array(build_prompt(problem.problem, None, tasks=run.tasks, tokenizer=tokenizer), np.int32)
    template = next(r for group in cases.groups() for r in group if not r.guided)
    return [
        replace(
            template,
            task=0,
            slot=slot,
            prompt=prompt,
            tokens=(tokens := np.array(tokenizer.encode(source.training(slot + 1).response), np.int32)),
            logprobs=np.zeros(len(tokens), np.float32),
            versions=np.array([5], np.int32),
            digests=np.zeros(1, np.int64),
            ends=np.array([len(tokens)], np.int32),
            reward=reward,
            finish="length" if slot in cut else "stop",
        )
        for slot, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize("kind", GUIDING)
def test_the_text_of_a_context_takes_the_place_of_the_strategy_everywhere(kind: str) -> None:
    plain, source = source_of(Run()), source_of(Run(tasks=Tasks(context=kind)))
    for position in range(5):
        before, found = plain.training(position), source.training(position)
        words = (before.response or "").split(" ")
        expected = {
            "response": before.response,
            "partial-response": " ".join(words[: -(-len(words) // 4)]),
            "answer": before.answer,
            "other-strategy": plain.training(position + 1).strategy,
        }[kind]
        assert found.strategy == expected and expected
        assert replace(found, strategy=before.strategy) == before
        assert source.training_problems()[position].strategy
    assert len(source.training_problems()) == len(plain.training_problems())
    assert [p.problem for p in source.held_out()] == [p.problem for p in plain.held_out()]
    assert all(p.strategy for p in source.held_out()) and source.strategies > 0
    sizes = [len(p.problem) + len(p.strategy or "") for p in source.training_problems()]
    assert [len(p.problem) + len(p.strategy or "") for p in source.longest_problems(3)] == sorted(sizes)[::-1][:3]
    task = TaskSampler(Run(tasks=Tasks(context=kind)), source).task(2)
    assert task.lease(attempt=0, min_version=0).strategy == source.training(2).strategy and task.guided


@pytest.mark.parametrize("kind", ["none", "sibling"])
def test_contexts_that_no_rollout_is_guided_by_have_no_text(kind: str) -> None:
    source = source_of(run_of(kind))
    assert source.strategies == 0 and source.training(0).strategy is None and source.held_out()[0].strategy is None


def test_a_chat_message_introduces_each_context_as_what_it_is() -> None:
    texts = set()
    for kind in ASKED:
        (message,) = chat("What is 2+3?", "CONTEXT", Tasks(prompt="chat", context=kind))
        assert "CONTEXT" in message["content"] and message["content"].endswith("Problem:\nWhat is 2+3?")
        texts.add(message["content"])
    assert len(texts) == 4  # strategies of both kinds, and solutions of both, are introduced alike


def written(tmp_path: Path, *, strategies: list[str], response: str = "4 + 5 = 9") -> str:
    """A file of problems with these strategies."""
    lines = [
        {"problem": f"problem {i}", "answer": "9", "strategy": text, "response": response}
        for i, text in enumerate(strategies)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def from_file(path: str, kind: str) -> Run:
    return Run(tasks=Tasks(context=kind, source="file", path=path, held_out=1))


def test_a_strategy_for_contrast_is_never_that_of_the_problem(tmp_path: Path) -> None:
    path = written(tmp_path, strategies=["add", "add", "add", "take", "take", "add", "take", "add", "add"])
    for split in ("training_problems", "held_out"):
        plain = list(getattr(source_of(from_file(path, "strategy")), split)())
        other = list(getattr(source_of(from_file(path, "other-strategy")), split)())
        if len(plain) > 1:
            assert [{"add": "take", "take": "add"}[one.strategy] for one in plain] == [one.strategy for one in other]
        else:
            assert [one.strategy for one in other] == [None], "there is no other problem"


def test_strategies_that_are_all_equal_give_no_contrast(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, strategies=["add"] * 4)
    assert {one.strategy for one in source_of(from_file(path, "other-strategy")).training_problems()} == {None}
    run = run_of("strategy", "rlcsd", rlcsd=Rlcsd())
    run = replace(run, tasks=from_file(path, "strategy").tasks)
    group = group_of(run, tokenizer, [1, 0])
    assert Contexts(run, source_of(run), tokenizer)(group) == {}, "a right context without a wrong one"


def test_a_solution_of_one_word_has_no_beginning(tmp_path: Path) -> None:
    kind = "partial-response"
    for response, expected in (("9", None), ("4 + 5 = 9", "4 +")):
        source = source_of(from_file(written(tmp_path, strategies=["add"] * 3, response=response), kind))
        assert {one.strategy for one in source.training_problems()} == {expected}


@pytest.mark.parametrize("kind", ["strategy", "response", "answer"])
def test_a_teacher_reads_the_problem_with_the_text_of_its_context(kind: str, tokenizer: Any) -> None:
    run = run_of(kind)
    found = Contexts(run, source_of(run), tokenizer)(group_of(run, tokenizer, [1, 0, 0, 0]))
    problem = source_of(run).training(0)
    expected = build_prompt(problem.problem, problem.strategy, tasks=run.tasks, tokenizer=tokenizer)
    assert [own.right.tolist() for own in found.values()] == [expected] * 4 and found.keys() == {0, 1, 2, 3}
    assert all(own.sibling is None and own.wrong == () and own.right.dtype == np.int32 for own in found.values())


def test_without_a_context_the_teacher_reads_the_plain_prompt(tokenizer: Any) -> None:
    run = run_of("none")
    group = group_of(run, tokenizer, [1, 0])
    found = Contexts(run, source_of(run), tokenizer)(group)
    assert all(np.array_equal(found[r.slot].right, r.prompt) for r in group)


def test_a_sibling_is_the_next_success_and_never_the_rollout_itself(tokenizer: Any) -> None:
    run = run_of("sibling", "sdpo")
    group = group_of(run, tokenizer, [1, 0, 1, 0])
    found = Contexts(run, source_of(run), tokenizer)(group)
    problem = source_of(run).training(0)

    def with_rollout(slot: int) -> list[int]:
        text = tokenizer.decode(group[slot].tokens, skip_special_tokens=True)
        return build_prompt(problem.problem, text, tasks=run.tasks, tokenizer=tokenizer)

    assert {slot: own.right.tolist() for slot, own in found.items()} == {
        0: with_rollout(2),
        1: with_rollout(2),
        2: with_rollout(0),
        3: with_rollout(0),
    }
    assert {slot: own.sibling for slot, own in found.items()} == {0: 2, 1: 2, 2: 0, 3: 0}


@pytest.mark.parametrize(
    ("rewards", "cut", "slots"), [([1, 0], (), {1}), ([0, 0], (), set()), ([1, 1, 0], (0,), {0, 2})]
)
def test_a_rollout_without_a_success_beside_it_has_no_context(
    rewards: list[float], cut: tuple[int, ...], slots: set[int], tokenizer: Any
) -> None:
    """A completion that was cut is no solution, even if a verifier found an answer in it."""
    run = run_of("sibling", "sdpo")
    assert Contexts(run, source_of(run), tokenizer)(group_of(run, tokenizer, rewards, cut=cut)).keys() == slots


def test_rlcsd_needs_a_right_and_a_wrong_sibling_and_takes_a_few(tokenizer: Any) -> None:
    run = run_of("sibling", "rlcsd", rlcsd=Rlcsd(wrong=2))
    found = Contexts(run, source_of(run), tokenizer)
    assert {slot: len(own.wrong) for slot, own in found(group_of(run, tokenizer, [1, 0, 0, 0])).items()} == {
        1: 2,
        2: 2,
        3: 2,
    }
    assert found(group_of(run, tokenizer, [1, 1, 0, 1])).keys() == {0, 1, 3}
    assert found(group_of(run, tokenizer, [1, 1])) == {}


def test_rlcsd_with_strategies_compares_with_the_strategy_of_the_next_problem(tokenizer: Any) -> None:
    run = run_of("strategy", "rlcsd")
    (own, *_) = Contexts(run, source_of(run), tokenizer)(group_of(run, tokenizer, [1, 0])).values()
    first, second = source_of(run).training(0), source_of(run).training(1)
    other = build_prompt(first.problem, second.strategy, tasks=run.tasks, tokenizer=tokenizer)
    assert [one.tolist() for one in own.wrong] == [other]


def test_a_context_that_leaves_no_room_for_the_rollout_is_left_out(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("response")
    group = group_of(run, tokenizer, [1, 0])
    longest = len(Contexts(run, source_of(run), tokenizer)(group)[0].right) + len(group[0].tokens)
    assert len(Contexts(run, source_of(run), tokenizer, longest=longest)(group[:1])) == 1
    assert Contexts(run, source_of(run), tokenizer, longest=longest - 1)(group[:1]) == {}
    assert f"more than the model's {longest - 1} positions" in caplog.text


def test_the_first_tokens_of_a_rollout_can_be_left_out() -> None:
    for rollout in (r for group in cases.spread(cases.groups()) for r in group):
        for skip in range(len(rollout.tokens) + 2):
            found = rollout.without_first(skip)
            assert found.sampled.tolist() == [t >= skip for t in range(len(rollout.tokens))]
            assert (found.token_versions() == rollout.token_versions())[found.sampled].all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_follows_the_demo_with_an_equal_budget(name: str) -> None:
    run = load("builtin:demo", [name])
    assert run.rollout.size == load("builtin:demo").rollout.size == 12
    source_of(run)


def test_every_method_can_follow_every_other_and_is_then_what_it_is_alone() -> None:
    paper = ["builtin:paper", "rollout.autonomous=8", "rollout.guided=4", "tasks.context=strategy"]
    for last, *words in [*([name] for name in METHODS), paper]:
        alone = load("builtin:demo", [last, *words])
        for first in METHODS:
            after = load("builtin:demo", [first, last, *words])
            distils = alone.algorithm.objective in ("opsd", "sdpo", "kdrl", "sgpo")
            keys = ["objective", "policy_gradient", "kl_clip", "reference_kl"]
            keys += ["divergence", "limiter"] * distils + ["teacher"] * alone.algorithm.asks_teacher
            keys += ["alpha"] * (alone.algorithm.objective in ("opsd", "sdpo", "kdrl", "pi-distill"))
            for key in keys:
                assert getattr(after.algorithm, key) == getattr(alone.algorithm, key), (first, last, key)
            assert (after.tasks, after.rollout) == (alone.tasks, alone.rollout), (first, last)


def test_held_out_problems_are_evaluated_in_the_same_context() -> None:
    for name in ("builtin:methods/opsd", "builtin:methods/pope"):
        tasks = load("builtin:demo", [name]).tasks
        source = open_source(tasks.source, path=tasks.path, held_out=4, seed=0, tasks=tasks)
        assert all(p.strategy and p.response and p.response.startswith(p.strategy) for p in source.held_out())


@pytest.mark.parametrize("name", METHODS)
def test_the_supervised_warm_up_of_a_method_is_that_of_any_run(name: str) -> None:
    warm_up = supervised(load("builtin:demo", [name]), steps=3)
    assert warm_up.tasks.context == "strategy" and warm_up.algorithm == Algorithm(objective="grpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["builtin:methods/sdpo", "rollout.guided=4"], r"rollout\.guided must be 0 with tasks\.context=sibling"),
        (["tasks.context=sibling"], r"tasks\.context must not be sibling with algorithm\.objective=sgpo"),
        (["builtin:methods/pope", "rollout.guided=0"], r"rollout\.guided must be >= 1 when algorithm\.objective=pope"),
        (["builtin:methods/maxrl", "tasks.context=sibling"], r"tasks\.context must not be sibling with .*=grpo"),
        (["builtin:methods/rlcsd", "tasks.context=answer"], r"tasks\.context must be strategy or sibling"),
        (["builtin:methods/opsd", "algorithm.teacher=behaviour"], r"algorithm\.(teacher|kl_clip) must"),
        (["builtin:methods/opsd", "algorithm.divergence=reverse"], r"algorithm\.kl_clip must be \.inf"),
        (["builtin:methods/sdft", "algorithm.divergence=sft"], r"algorithm\.divergence must not be sft"),
        (
            ["builtin:methods/opsd", "algorithm.teacher=behaviour", "algorithm.kl_clip=.inf"],
            r"algorithm\.teacher must not",
        ),
        (
            ["algorithm.kl_clip=0.1", "algorithm.teacher=behaviour"],
            r"algorithm\.kl_clip must be \.inf with .*behaviour",
        ),
        (["builtin:methods/pi-distill", "algorithm.kl_clip=0.1"], r"algorithm\.kl_clip must be \.inf"),
        (
            ["builtin:methods/pi-distill", "algorithm.grpo_correction.mode=none"],
            r"algorithm\.grpo_correction\.mode must",
        ),
        (["builtin:methods/opsd", "algorithm.reference_kl=0.1"], r"algorithm\.reference_kl must be 0"),
        (["builtin:methods/sdpo", "algorithm.reference_kl=0.1"], r"algorithm\.reference_kl must be 0"),
        (["algorithm.policy_gradient=false", "algorithm.reference_kl=0.1"], r"algorithm\.reference_kl must be 0"),
        (
            ["builtin:methods/opsd", "tasks.context=none", "algorithm.teacher=self"],
            r"algorithm\.teacher must not be self",
        ),
        (["builtin:methods/sdpo", "rollout.autonomous=1"], r"rollout\.autonomous must be >= 2"),
        (["tasks.context=none"], r"tasks\.context must not be none with algorithm\.objective=sgpo"),
        (["builtin:methods/sdpo", "algorithm.alpha=1.5"], r"algorithm\.alpha must be <= 1"),
        (["builtin:methods/pi-distill", "algorithm.teacher=frozen"], r"algorithm\.teacher must be self"),
        (
            ["builtin:methods/opsd", "algorithm.kl_correction.mode=prefix"],
            r"algorithm\.kl_correction\.mode must be none",
        ),
        (["algorithm.rlsd.clip=1.5"], r"algorithm\.rlsd\.clip must be in \(0, 1\), got 1\.5"),
        (["algorithm.rlcsd.wrong=0"], r"algorithm\.rlcsd\.wrong must be >= 1, got 0"),
        (["algorithm.reference_kl=-1"], r"algorithm\.reference_kl must be >= 0, got -1"),
    ],
)
def test_a_context_or_method_that_cannot_be_trained_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("builtin:demo", words)

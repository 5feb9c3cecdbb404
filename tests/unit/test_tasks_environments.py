"""Environments: turns of an episode, in this process and in the worker processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from own_environment import Guess

from sgpo_async.config import Run
from sgpo_async.config.schema import Tasks
from sgpo_async.errors import ConfigError, DataError, SgpoError
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.environments import Turn, load_environment, play
from sgpo_async.tasks.prompts import build_prompt, build_reply
from sgpo_async.tasks.reward_pool import RewardPool, Verdict
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler

DEADLINE_S = 120.0
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def guess(*completions: str, answer: str = "5", **columns: int) -> Turn:
    sample = Sample(problem="guess", answer=answer, completion=completions[-1], columns=columns)
    return play("own_environment:Guess", Guess, sample, completions[:-1])


def test_every_turn_repeats_the_earlier_ones_and_sums_their_rewards() -> None:
    assert guess("3") == Turn(reply="low", reward=-0.1)
    assert guess("3", "9") == Turn(reply="high", reward=-0.2)
    assert guess("3", "9", "5") == Turn(done=True, reward=pytest.approx(0.8))
    assert guess("3", "9", guesses=2) == Turn(reply="high", done=True, reward=-0.2)
    assert guess("what?") == Turn(done=True)


def test_an_environment_must_do_the_same_again() -> None:
    with pytest.raises(DataError, match="turn 1 ends an episode that has 2: it must always do the same"):
        guess("5", "3")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "Raises",
            r"environment own_environment:Raises: for the problem 'guess' raised KeyError: 'no such tool' at .*",
        ),
        ("NoTurn", r".* step must return a Turn, got 'low'"),
        ("Silent", r".* Turn.reply must be a text that is not empty unless the episode is done, got ''"),
        ("Unbounded", r".* Turn.reward must be a finite number, got inf"),
    ],
)
def test_an_environment_at_fault_is_one_line_with_class_problem_and_value(name: str, expected: str) -> None:
    name = f"own_environment:{name}"
    with pytest.raises(DataError, match=expected) as caught:
        play(name, load_environment(name), Sample(problem="guess", answer="5", completion="3"), [])
    assert "\n" not in str(caught.value)


def test_an_environment_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(DataError, match="tasks.environment: own_environment:Absent: own_environment has no function"):
        load_environment("own_environment:Absent")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"environment": "nothing"}, "tasks.environment must be MODULE:CLASS, got 'nothing'"),
        ({"environment": "a:B", "reward": "math"}, "tasks.reward must be empty with tasks.environment"),
        ({"max_turns": 0}, "tasks.max_turns must be >= 1, got 0"),
    ],
)
def test_the_rules_of_the_settings(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Tasks(**settings)  # type: ignore[arg-type]


def test_training_and_held_out_tasks_are_episodes() -> None:
    run = Run(tasks=Tasks(environment="own_environment:Guess", max_turns=3, held_out=2))
    sampler = TaskSampler(run, source_of(run))
    for number in (0, -1):
        lease = sampler.task(number).lease(attempt=0, min_version=0)
        assert (lease.verifier, lease.turns) == ("own_environment:Guess", 3)
    run = Run(tasks=Tasks(held_out=2))
    assert TaskSampler(run, source_of(run)).task(0).lease(attempt=0, min_version=0).turns == 0


# ---- in worker processes


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardPool]:
    monkeypatch.chdir(Path(__file__).parent)  # own modules are found in the working folder
    pool = RewardPool(workers=1, limit_s=3.0)
    yield pool
    pool.close()


def turn_of(pool: RewardPool, name: str, completion: str, earlier: Sequence[str] = ()) -> Verdict:
    sample = Sample(problem="guess", answer="5", completion=completion)
    pool.submit("key", f"own_environment:{name}", sample, earlier=earlier)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if verdicts := pool.poll(timeout_s=1.0):
            return verdicts[0]
    raise AssertionError("no verdict")


@pytest.mark.process
def test_turns_are_played_in_a_worker_with_its_limits(pool: RewardPool) -> None:
    assert turn_of(pool, "Guess", "3") == Verdict(key="key", reward=-0.1, reply="low")
    assert turn_of(pool, "Guess", "5", ["3"]) == Verdict(key="key", reward=0.9)
    assert turn_of(pool, "Endless", "3") == Verdict(key="key", reward=0.0, timed_out=True)
    assert turn_of(pool, "Guess", "9") == Verdict(key="key", reward=-0.1, reply="high"), "another worker goes on"
    with pytest.raises(SgpoError, match="environment own_environment:Raises: .* raised KeyError"):
        turn_of(pool, "Raises", "3")


# ---- replies as tokens


def test_a_plain_reply_is_the_text_itself() -> None:
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    assert tokenizer.decode(build_reply("amber raise", tasks=Tasks(), tokenizer=tokenizer)) == "amber raise"


def test_a_reply_cannot_spell_an_end_token() -> None:
    """Otherwise the output of a tool could end a turn, and an engine continues no completion that has ended."""
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    assert tokenizer.decode(build_reply("amber <eos> raise <eos>", tasks=Tasks(), tokenizer=tokenizer)) == "amber raise"
    with pytest.raises(DataError, match="has no token"):
        build_reply("<eos>", tasks=Tasks(), tokenizer=tokenizer)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_reply_in_a_chat_is_what_the_template_writes_after_a_completion(role: str) -> None:
    """Prompt, completions with their end tokens, and replies are the whole conversation."""
    tokenizer = chat_tokenizer(CHATML)
    tasks = Tasks(prompt="chat", reply_role=role)  # type: ignore[arg-type]
    prompt = build_prompt("2 + 2", None, tasks=tasks, tokenizer=tokenizer)
    completion = tokenizer.encode("I call it.<eos>", add_special_tokens=False)
    reply = build_reply("4", tasks=tasks, tokenizer=tokenizer, end=completion[-1])
    other = build_reply("4", tasks=tasks, tokenizer=tokenizer, end=7)  # an engine may stop at another end token
    assert other == [completion[-1], *reply]
    messages = [("user", "2 + 2"), ("assistant", "I call it."), (role, "4")]
    whole = tokenizer.apply_chat_template(
        [{"role": name, "content": text} for name, text in messages], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(prompt + completion + reply) == whole


def test_a_template_that_leaves_completions_out_is_one_line() -> None:
    only_last = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match=r"tasks.reply_role: the chat template of .* choose another role"):
        build_reply("4", tasks=Tasks(prompt="chat"), tokenizer=chat_tokenizer(only_last))


def test_a_reply_without_a_token_is_one_line() -> None:
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    with pytest.raises(DataError, match=r"tasks.environment: the reply ' ' has no token"):
        build_reply(" ", tasks=Tasks(), tokenizer=tokenizer)


def chat_tokenizer(template: str):
    """A tokenizer with one token for each byte, and with this template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(sorted(alphabet))}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer

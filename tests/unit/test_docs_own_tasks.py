"""The examples of docs/own-tasks.md run and do what the page says."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from sgpo_async.config import Run, load
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.environments import Turn, load_environment, play
from sgpo_async.tasks.prompts import build_prompt, chat
from sgpo_async.tasks.reward_pool import RewardPool
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.verify import is_math_correct
from sgpo_async.wire.records import is_correct

PAGE = Path(__file__).parents[2] / "docs" / "own-tasks.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
LINES = 20  # of an example
DEADLINE_S = 120.0


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.M | re.S)


def run_of(title: str, folder: Path) -> Run:
    """The configuration of a section, in `folder`."""
    (text,) = blocks(title, "yaml")
    (folder / "run.yaml").write_text(text)
    return load(folder / "run.yaml")


def write(path: Path, *records: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("title", ["Problems", "A reward", "A prompt", "Several turns, and tools"])
def test_an_example_is_short(title: str) -> None:
    examples = [*blocks(title, "yaml"), *blocks(title, "python")]
    assert examples and sum(len(text.splitlines()) for text in examples) <= LINES
    assert all(yaml.safe_load(text) for text in blocks(title, "yaml"))


def test_the_example_reads_problems_in_the_form_of_gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of("Problems", tmp_path)
    solutions = [f"It is {n} + 2 = {n + 2}.\n#### {n + 2}" for n in range(6)]
    write(tmp_path / run.tasks.path, *[{"question": f"{n} + 2?", "answer": text} for n, text in enumerate(solutions)])
    source = source_of(run)
    problems = [source.training(position) for position in range(4)] + list(source.held_out())
    assert sorted((one.problem, one.answer) for one in problems) == [(f"{n} + 2?", str(n + 2)) for n in range(6)]
    assert sorted(one.response or "" for one in problems) == sorted(solutions) and source.responses == 4
    assert all(is_math_correct(one.answer, one.response or "") for one in problems), "a response is a right completion"


@pytest.mark.process
def test_the_example_reward_judges_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("A reward", "python")
    (tmp_path / "my_rewards.py").write_text(code)
    run = run_of("A reward", tmp_path)
    write(tmp_path / run.tasks.path, *[{"problem": f"{n} + 2?", "answer": n + 2, "level": 2} for n in range(300)])
    source = source_of(run)
    problem = source.training(0)
    completions = {
        f"\\boxed{{{problem.answer}}}": 1.0 + 0.2 * 0.4,
        f"It is {problem.answer}.": 1.0,
        "\\boxed{0}": 0.2 * 0.4,
        "no idea": 0.0,
    }
    pool = RewardPool(workers=1, limit_s=run.tasks.reward_limit_s, memory_mb=run.tasks.reward_memory_mb)
    try:
        for text in completions:
            columns = json.loads(problem.columns)
            sample = Sample(problem=problem.problem, answer=problem.answer, completion=text, columns=columns)
            pool.submit(text, source.verifier, sample)
        rewards: dict[object, float] = {}
        deadline = time.monotonic() + DEADLINE_S
        while len(rewards) < len(completions) and time.monotonic() < deadline:
            rewards |= {verdict.key: verdict.reward for verdict in pool.poll(1.0)}
    finally:
        pool.close()
    assert rewards == pytest.approx(completions)
    correct = [is_correct(rewards[text], run.tasks.solved_at) for text in completions]
    assert correct == [True, True, False, False]


def test_the_example_prompts_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = run_of("A prompt", tmp_path).tasks
    system, user = chat("1 + 1?", "Count.", tasks)
    assert (
        system["content"].startswith("You are a careful mathematician.\n\nFollow this strategy:")
        and tasks.template_args
    )
    assert user["content"] == "1 + 1?\nPut the final answer into \\boxed{}."
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (code,) = blocks("A prompt", "python")
    (tmp_path / "my_prompts.py").write_text(code)
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    tokenizer.encode = lambda text, **_: [ord(letter) for letter in text]
    own = load("", ["tasks.prompt=my_prompts:ask"]).tasks
    for strategy, expected in ((None, "Question: P\nAnswer:"), ("S", "Question: P Hint: S\nAnswer:")):
        ids = build_prompt("P", strategy, tasks=own, tokenizer=tokenizer)
        assert "".join(chr(one) for one in ids) == expected


def test_the_example_environment_plays_an_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("Several turns, and tools", "python")
    (tmp_path / "my_tools.py").write_text(code)
    run = run_of("Several turns, and tools", tmp_path)
    assert (run.tasks.environment, run.tasks.max_turns) == ("my_tools:Calculator", 4)
    make = load_environment(run.tasks.environment)

    def turn(*completions: str) -> Turn:
        sample = Sample(problem="17 * 23 + 4?", answer="395", completion=completions[-1])
        return play(run.tasks.environment, make, sample, completions[:-1])

    assert turn("calc 17 * 23") == Turn(reply="391")
    assert turn("calc 17 * 23", "calc 391 + 4") == Turn(reply="395")
    assert turn("calc 17 * 23", "calc 391 + 4", " 395") == Turn(done=True, reward=1.0)
    assert turn("calc 17 / 23") == Turn(done=True)

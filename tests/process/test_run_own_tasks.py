"""A run on problems, a reward and a prompt of the user's own; and mistakes in them, found before anything starts."""

import json
import os
from pathlib import Path

import pytest
from run_support import RealRun, assert_all_trained, chat_model, real_run

from sgpo_async.tasks.cues import CuesSource

pytestmark = pytest.mark.process

MODULE = '''
from sgpo_async.tasks.cues_domain import is_correct

def reward(sample):
    """2 for a right completion, and a little for its length; the level is a column of the problem."""
    assert sample.columns["level"] in range(4) and sample.problem.startswith("problem")
    return 2.0 * is_correct(sample.answer, sample.completion) + 0.01 * len(sample.completion.split()) - 0.1

def prompt(problem, strategy, tokenizer):
    return problem if strategy is None else f"{strategy}\\n{problem}"

def returns_nothing(sample):
    pass

def raises(problem, strategy, tokenizer):
    raise ValueError("no such style")
'''
OWN = (
    "steps=2", "local.actors=1", "local.ranks=1", "tasks.source=file", "tasks.answer_after='####'",
    "tasks.columns={problem: question, answer: solution, strategy: hint}", "tasks.prompt=own_tasks:prompt",
    "tasks.reward=own_tasks:reward", "tasks.solved_at=1.5",
)  # fmt: skip


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of the built-in domain's problems with other columns; the module is where Python looks for it."""
    (tmp_path / "own_tasks.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    source = CuesSource(seed=0, held_out=1)
    with (tmp_path / "own.jsonl").open("w") as file:
        for number in range(40):
            one = source.training(number)
            solution = f"{one.response}\n#### {one.answer}"
            record = {"question": one.problem, "solution": solution, "hint": one.strategy, "level": number % 4}
            print(json.dumps(record), file=file)
    return f"tasks.path={tmp_path / 'own.jsonl'}"


@pytest.mark.slow
def test_a_run_trains_with_a_reward_and_a_prompt_of_the_user(tmp_path: Path, problems: str) -> None:
    with real_run(tmp_path, *OWN, problems) as run:
        local = run.local()
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        for line in run.metrics():
            assert line["pass_guided"] > 0.5 > line["pass_auto"], "the policy carries out strategies"
            assert line["reward_guided"] > 1.5 and line["reward_guided"] != 2 * line["pass_guided"]
            assert line["targets"] > 0 and line["alpha"] > 0
        assert_all_trained(run.summary()["ledger"], tasks=2 * 4, size=12)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (
            "local",
            ["tasks.reward=own_tasks:nosuch"],
            "tasks.reward: own_tasks:nosuch: own_tasks has no function nosuch",
        ),
        (
            "hub",
            ["tasks.reward=own_tasks:returns_nothing"],
            "reward own_tasks:returns_nothing: must return a finite number",
        ),
        ("local", ["tasks.prompt=own_tasks:raises"], "tasks.prompt: own_tasks:raises raised ValueError: no such style"),
        (
            "local",
            ["tasks.prompt=chat", "model.path={model}"],
            "the chat template of {model} fails (TemplateSyntaxError",
        ),
        ("local", ["tasks.columns={answer: none}"], "no column 'none'; there are 'question', 'solution'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    tmp_path: Path, problems: str, command: str, overrides: list[str], message: str
) -> None:
    model = str(chat_model(tmp_path / "model"))
    Path(model, "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}")
    with real_run(tmp_path, *OWN, problems) as run:
        errors = _errors(run, command, [one.replace("{model}", model) for one in overrides])
        assert len(errors) == 1 and message.replace("{model}", model) in errors[0]
        assert not run.folder.exists() or not list(run.folder.glob("logs/*")), "nothing was started"
        run.assert_cleaned_up()


def _errors(run: RealRun, command: str, overrides: list[str]) -> list[str]:
    process = run.local(*overrides) if command == "local" else run.hub(*overrides)
    assert process.wait() == 2, process.output
    assert "Traceback" not in process.output
    return [line for line in process.output.splitlines() if line.startswith("error: ")]

"""`sgpo-async chat`: which policy it takes, and what it prints."""

import io
import os
import shutil
from pathlib import Path

import pytest

from sgpo_async.cli import chat as command
from sgpo_async.cli.main import main
from sgpo_async.config import load, to_yaml
from sgpo_async.errors import DataError, EngineError
from sgpo_async.evaluation.chat import Chat, ChatSettings, Completion, find_policy
from sgpo_async.model.folder import model_folder

BASE = Path(model_folder("builtin:cues"))
PROBLEM = "problem 3 yarrow 4 meadow 2 juniper from 8 9"
STRATEGY = "strategy yarrow swap meadow lower juniper raise"


def run_folder(
    folder: Path, *overrides: str, policy: float | None = None, checkpoints: dict[int, float] | None = None
) -> Path:
    """A run's folder with an exported policy and checkpoints that were written at these times."""
    folder.mkdir(exist_ok=True)
    run = load("configs/demo.yaml", ["rollout.max_new_tokens=11", *overrides])
    (folder / "config.yaml").write_text(to_yaml(run))
    if policy is not None:
        shutil.copytree(BASE, folder / "policy")
        for file in (folder / "policy").iterdir():
            os.utime(file, (policy, policy))
    for step, at in (checkpoints or {}).items():
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        os.utime(path, (at, at))
    return folder


def test_a_model_folder_is_a_policy() -> None:
    found = find_policy(BASE)
    assert found.run.model.path == str(BASE) and found.checkpoint is None and found.tasks is None
    assert found.name.startswith(f"{BASE}, written 2")


@pytest.mark.parametrize(
    ("policy", "checkpoints", "expected"),
    [
        (100.0, {}, "policy"),
        (None, {20: 100.0}, "step-00000020"),
        (None, {20: 100.0, 9: 300.0}, "step-00000020"),  # of an earlier attempt of the run
        (200.0, {20: 100.0}, "policy"),
        (100.0, {20: 200.0}, "step-00000020"),  # the run was continued after its export
    ],
)
def test_the_newest_export_or_checkpoint_of_a_run_is_taken(
    tmp_path: Path, policy: float | None, checkpoints: dict[int, float], expected: str
) -> None:
    found = find_policy(run_folder(tmp_path, "tasks.suffix=' ='", policy=policy, checkpoints=checkpoints))
    assert Path(found.checkpoint or found.run.model.path).name == expected
    assert found.run.rollout.max_new_tokens == 11
    assert found.tasks is not None and found.tasks.suffix == " ="


@pytest.mark.parametrize("kind", ["empty", "missing", "begun"])
def test_a_folder_without_a_policy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    folder = {"empty": tmp_path, "missing": tmp_path / "missing"}.get(kind) or run_folder(tmp_path / "run")
    assert main(["chat", str(folder), "--problem", "x"]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: has neither an exported policy nor a checkpoint" in error and error.count("\n") == 1
    with pytest.raises(DataError):
        find_policy(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = run_folder(tmp_path_factory.mktemp("run"), policy=100.0)
    return Chat(find_policy(folder), ChatSettings(max_new_tokens=40, temperature=0.01))


def test_the_strategy_changes_the_completion(chat: Chat) -> None:
    (alone,) = chat.complete(PROBLEM, None)
    plain, guided = chat.complete(PROBLEM, STRATEGY)
    assert plain.text == alone.text, "at temperature 0.01"
    assert "yarrow swap" in guided.text and "meadow lower" in guided.text and "juniper raise" in guided.text
    assert guided.finish == "stop" and guided.tokens > 10
    assert "<eos>" not in guided.text


def test_each_try_has_samples_of_its_own_and_a_seed_repeats_them(tmp_path: Path) -> None:
    found = find_policy(run_folder(tmp_path, policy=100.0))
    tries = []
    for seed in (0, 0, 1):
        chat = Chat(found, ChatSettings(temperature=5.0, seed=seed))
        tries.append([chat.complete(PROBLEM, None)[0].text for _ in range(2)])
        chat.close()
    assert tries[0] == tries[1] != tries[2]
    assert tries[0][0] != tries[0][1]


def test_a_prompt_that_is_too_long_fails_and_the_next_is_served(chat: Chat) -> None:
    for problem, strategy in (("3 " * 5000, None), (PROBLEM, "swap " * 5000)):
        with pytest.raises(EngineError, match="exceed the model's"):
            chat.complete(problem, strategy)
    assert len(chat.complete(PROBLEM, STRATEGY)) == 2


def talk(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, *arguments: str, width: int = 80) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setenv("COLUMNS", str(width))
    return main(["chat", str(folder), "--temperature", "0.01", "--max-new-tokens", "40", *arguments])


@pytest.mark.parametrize("width", [80, 140])
def test_problems_are_read_until_an_empty_line_or_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    folder = run_folder(tmp_path, policy=100.0)
    assert talk(monkeypatch, folder, f"{PROBLEM}\n{STRATEGY}\n{PROBLEM}\n\n\nnot read\n", width=width) == 0
    first = capsys.readouterr().out
    assert first.count("with the strategy") == 1 and first.count("alone") == 2
    assert ("alone" in next(line for line in first.splitlines() if "with the strategy" in line)) == (width == 140)
    assert talk(monkeypatch, folder, f"{PROBLEM}", width=width) == 0
    assert capsys.readouterr().out.count("alone") == 1


def test_a_problem_that_cannot_be_served_does_not_end_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path, policy=100.0)
    assert talk(monkeypatch, folder, f"{'3 ' * 5000}\n\n{PROBLEM}\n\n") == 0
    printed = capsys.readouterr()
    assert "exceed the model's" in printed.err and "yarrow" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "x"], "--strategy needs --problem"),
        (["--problem", "x", "--temperature", "0"], "--temperature must be > 0, got 0"),
        (["--problem", "x", "--max-new-tokens", "0"], "--max-new-tokens must be >= 1, got 0"),
        (["--problem", ""], "prompt and completion must have at least one token each"),
        (["--problem", "x", "--prompt", "chat"], "no chat template"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["chat", str(BASE), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["\x1b[31mred", "[bold]x[/bold]", ":smile:", "漢字\u202e", "a\nb\x07"])
def test_what_the_policy_wrote_cannot_control_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for width in (60, 140):
        completions = [Completion(text, 3, "stop"), Completion(text, 3, "length")]
        command._show(Console(markup=False, emoji=False, highlight=False, width=width), completions)
        printed = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in printed)
        assert "cut off: --max-new-tokens" in " ".join(printed.split())
        assert ("[bold]x[/bold]" in printed) == ("[bold]" in text) and (":smile:" in printed) == (":smile:" in text)

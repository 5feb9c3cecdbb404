"""`sgpo-async init`: the file that it writes, its questions, and its errors."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sgpo_async.cli import main as cli
from sgpo_async.cli.starter import BUILTIN_MODEL, Answers, Machine, ProblemFacts, starter
from sgpo_async.config import Run, load
from sgpo_async.model.folder import model_folder

BUILTIN = Answers("run", BUILTIN_MODEL, None, Machine())
FILE = ProblemFacts("problems.jsonl", 4000, 4000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with problems in three forms and a model with a chat template."""
    monkeypatch.chdir(tmp_path)
    for name, record in {
        "own": {"problem": "1 + {}", "answer": "{}", "strategy": "Add."},
        "gsm8k": {"question": "1 + {}", "answer": "It is so.\n#### {}"},
        "bare": {"q": "1 + {}", "a": "{}"},
    }.items():
        lines = [json.dumps({key: text.format(n) for key, text in record.items()}) for n in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    shutil.copytree(model_folder(BUILTIN_MODEL), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return tmp_path


def answers(text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["init", *arguments])


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize("sglang", [False, True])
@pytest.mark.parametrize("problems", [None, FILE, replace(FILE, strategies=0, columns={"problem": "the question"})])
@pytest.mark.parametrize("model", [BUILTIN_MODEL, "/models/a b: c", "no"])
def test_whatever_was_answered_the_file_is_valid_and_commented(
    gpus: int, sglang: bool, problems: ProblemFacts | None, model: str, tmp_path: Path
) -> None:
    text = starter(Answers("mine", model, problems, Machine(gpus, sglang), chat=True, positions=4096))
    (tmp_path / "mine.yaml").write_text(text)
    run = load(tmp_path / "mine.yaml")
    assert (run.name, run.model.path) == ("mine", model)
    assert run.algorithm.objective == ("sgpo" if problems is None or problems.strategies else "grpo")
    assert run.engine.kind == ("sglang" if sglang else "embedded")
    for line in text.splitlines()[1:]:
        assert len(line) <= 140 and ("  # " in line or re.fullmatch(r" *\w+:", line)), line


def test_with_the_defaults_the_run_is_the_demo(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(starter(replace(BUILTIN, name="demo")))
    demo = load("builtin:demo")
    assert load(tmp_path / "demo.yaml") == replace(demo, engine=replace(demo.engine, device="cpu"))


def test_enter_accepts_each_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers("\n\n\n", monkeypatch) == 0
    output = capsys.readouterr().out
    assert output.count(" [builtin]: ") == 2 and output.count(" [cpu]: ") == 1
    assert "next:\n  sgpo-async doctor run.yaml" in output and "sgpo-async local run.yaml" in output
    asked = (folder / "run.yaml").read_text()
    assert cli.main(["init", "run.yaml", "--yes", "--force"]) == 0
    assert (folder / "run.yaml").read_text() == asked


def test_a_wrong_answer_is_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers("./nowhere\nmodel\nbare.jsonl\nown.jsonl\nfast\n2\n", monkeypatch, "two.yaml") == 0
    output = capsys.readouterr()
    assert output.err.count("error: ") == 3
    assert "CUDA_VISIBLE_DEVICES=1 sgpo-async actor --hub" in output.out
    run = load("two.yaml")
    assert (run.tasks.path, run.tasks.prompt, run.tasks.held_out) == ("own.jsonl", "chat", 3)
    assert (run.engine.kind, run.local.ranks, run.rollout.max_new_tokens) == ("sglang", 1, 64)
    assert yaml.safe_load(Path("two.yaml").read_text())["name"] == "two"


def test_the_columns_of_public_datasets_are_recognised(folder: Path) -> None:
    assert cli.main(["init", "--model", "model", "--problems", "gsm8k.jsonl", "--yes"]) == 0
    tasks = load("run.yaml").tasks
    assert tasks.columns == {"problem": "question", "response": "answer"} and tasks.answer_after == "####"
    assert load("run.yaml").rollout.guided == 0
    named = ["--column", "problem=q", "--column", "answer=a", "--problems", "bare.jsonl"]
    assert cli.main(["init", "bare.yaml", "--model", "model", *named, "--yes"]) == 0
    assert load("bare.yaml").tasks.columns == {"problem": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["own.jsonl"], "FILE must end in .yaml, got 'own.jsonl'"),
        (["--model", "nowhere"], "--model: nowhere: no such folder; name a folder"),
        (["--model", "./nowhere"], "model.path: ./nowhere: no such folder"),
        (["--problems", "own.jsonl"], "--model must name a model of yours"),
        (["--model", "model", "--problems", "no.jsonl"], "no.jsonl: no such file"),
        (
            ["--model", "model", "--problems", "bare.jsonl"],
            "bare.jsonl:1: no column 'problem'; there are 'q', 'a'; set tasks.columns={problem: THEIR-NAME}; "
            "here as --column OURS=THEIRS",
        ),
        (
            ["--machine", "0"],
            "--machine must be cpu, cpu-sglang (with an SGLang server), or the number of GPUs, got '0'",
        ),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "own.jsonl" in arguments[:1]:
        (folder / "own.jsonl").unlink()
    before = sorted(folder.iterdir())
    assert cli.main(["init", "--yes", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}") and error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_a_file_is_not_overwritten_and_the_end_of_the_input_is_no_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text("steps: 1\n")
    assert cli.main(["init", "--yes"]) == 2
    assert capsys.readouterr().err == "error: run.yaml: exists; name another FILE, or overwrite it with --force\n"
    assert load("run.yaml") == Run(steps=1)
    assert answers("", monkeypatch, "other.yaml") == 2
    assert capsys.readouterr().err == "error: init: no answer; give --model, or --yes for the defaults\n"


def test_the_other_commands_accept_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--yes"]) == 0
    for command in (["local", "run.yaml", "--dry-run"], ["plan", "run.yaml"], ["doctor", "run.yaml"]):
        assert cli.main(command) == 0, capsys.readouterr()
    assert "nothing failed" in capsys.readouterr().out

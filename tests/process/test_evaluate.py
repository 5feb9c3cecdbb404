"""`sgpo-async evaluate` as a user runs it: the shipped policy, another model, benchmarks, and resuming after a kill."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import ROOT, RealRun, real_run, until
from safetensors.torch import load_file, save_file

from sgpo_async.model.folder import model_folder
from sgpo_async.tasks.sources import open_source

pytestmark = pytest.mark.process

EVALUATE = "launch/evaluate.py"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RealRun]:
    """The engine is deterministic: a sample does not depend on what was generated before."""
    with real_run(tmp_path, "tasks.held_out=10", "engine.deterministic=true", "local.actors=1") as run:
        yield run


def evaluate(run: RealRun, name: str, *arguments: str) -> dict[str, Any]:
    """Run the command; return its summary."""
    out = run.folder / name
    started = run.start(name, EVALUATE, str(run.config), "--out", str(out), *arguments)
    assert started.wait() == 0, started.output
    assert f"results: {out}" in started.output
    return json.loads((out / "summary.json").read_text())


def compare(a: Path, b: Path) -> str:
    command = [sys.executable, EVALUATE, "--compare", str(a), str(b)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout


def uniform_model(folder: Path) -> Path:
    """Save the shipped policy with a head of zeros, which makes all tokens equally likely."""
    shutil.copytree(model_folder("builtin:cues"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_two_different_models_are_compared(run: RealRun, tmp_path: Path) -> None:
    """With strategies, the shipped policy solves most problems and the uniform model none: p = 2 / 2^10."""
    good = evaluate(run, "good", "--guided", "--samples", "4")["benchmarks"]["held-out"]
    assert good["avg"]["mean"] > 0.9 and good["truncated"] == 0 and good["problems"] == 10
    other = ("--model", str(uniform_model(tmp_path / "uniform")))
    bad = evaluate(run, "bad", "--guided", "--samples", "4", *other, "--texts", "rollout.max_new_tokens=8")
    assert bad["benchmarks"]["held-out"]["avg"]["mean"] == 0
    lines = [json.loads(line) for line in (run.folder / "bad" / "held-out.jsonl").read_text().splitlines()]
    assert all(len(text.split()) <= 8 for line in lines for text in line["texts"])
    table = compare(run.folder / "good", run.folder / "bad")
    assert "10 / 0 of 10" in table and "0.002" in table
    assert "differ in model" in table and "differ in max_new_tokens: 40, 8" in table


def solved(text: str, answer: str) -> bool:
    """Whether there are five steps `digit word word digit digit` whose last two digits are those of the answer."""
    words = text.split()
    form = [word.isdigit() for word in words] == [True, False, False, True, True] * 5
    return form and [word for i, word in enumerate(words) if i % 5 > 2] == answer.split()


def test_the_scores_equal_those_computed_from_the_texts(run: RealRun) -> None:
    """At a high temperature some samples are correct; pass@k equals a count over all choices of k samples."""
    arguments = ("--guided", "--temperature", "1.6", "--top-p", "1", "--samples", "6", "--texts")
    found = evaluate(run, "hot", *arguments)["benchmarks"]["held-out"]
    problems = {problem.id: problem for problem in open_source("cues", path="", held_out=10, seed=0).held_out()}
    lines = [json.loads(line) for line in (run.folder / "hot/held-out.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == problems.keys()
    verdicts = [[solved(text, problems[line["id"]].answer) for text in line["texts"]] for line in lines]
    assert [line["correct"] for line in lines] == verdicts
    assert found["avg"]["mean"] == pytest.approx(sum(map(sum, verdicts)) / 60)
    assert 0.05 < found["avg"]["mean"] < 0.95
    for k, passed in found["pass"].items():
        choices = [any(chosen) for verdict in verdicts for chosen in combinations(verdict, int(k))]
        assert passed["mean"] == pytest.approx(sum(choices) / len(choices)), k
    assert list(found["pass"]) == ["1", "2", "4"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_gives_the_same_result(run: RealRun) -> None:
    """The second call keeps the complete problems and evaluates only the others."""
    uninterrupted = evaluate(run, "uninterrupted", "--samples", "8")
    out = run.folder / "killed"
    command = (EVALUATE, str(run.config), "--out", str(out), "--samples", "8")
    first = run.start("first", *command)
    path = out / "held-out.jsonl"
    until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 2, "two complete problems")
    first.process.kill()
    first.process.wait()
    done = path.read_bytes()
    kept = done[: done.rfind(b"\n") + 1]
    problems = kept.count(b"\n")
    assert 2 <= problems < 10 and not (out / "summary.json").exists()
    with path.open("ab") as file:
        file.write(b'{"id": "cues')  # an incomplete line, as a kill can leave it
    second = run.start("second", *command)
    assert second.wait() == 0, second.output
    assert second.output.startswith(f"{problems} of 10 problems")
    assert path.read_bytes().startswith(kept)
    assert sorted(path.read_text().splitlines()) == sorted(
        (run.folder / "uninterrupted/held-out.jsonl").read_text().splitlines()
    )
    assert json.loads((out / "summary.json").read_text()) == uninterrupted
    third = run.start("third", *command, "--temperature", "1")
    assert third.wait() == 2 and "holds another evaluation (temperature: 1.0, 0.6 there)" in third.output


def test_benchmarks_are_given_by_file_or_by_name(run: RealRun, tmp_path: Path) -> None:
    """The policy cannot read the sums; math-verify checks its answers in worker processes."""
    sums = [{"id": i, "question": f"What is {i} + 777000?", "answer": float(777000 + i)} for i in range(5)]
    (tmp_path / "amc23.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    configured = f"evaluation.benchmarks.own.path={tmp_path / 'own.jsonl'}"
    (tmp_path / "own.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    found = evaluate(
        run, "files", "--benchmark", f"amc23={tmp_path / 'amc23.jsonl'}", "--benchmark", "own", "--benchmark",
        "held-out", "--samples", "2", "--samples", "amc23=3", configured, "evaluation.benchmarks.own.samples=4",
        "rollout.max_new_tokens=8",
    )["benchmarks"]  # fmt: skip
    assert {name: (score["problems"], score["samples"]) for name, score in found.items()} == {
        "amc23": (5, 3),
        "own": (1, 4),
        "held-out": (10, 2),
    }
    assert found["amc23"]["avg"]["mean"] == 0
    wrong = run.start("wrong", EVALUATE, str(run.config), "--benchmark", "math500")
    assert wrong.wait() == 2
    assert "--benchmark: math500 names no file (NAME=FILE) and none of held-out" in wrong.output

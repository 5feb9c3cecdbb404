"""Changed inputs are refused as they should be; what is not is found, and said so that it can be repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from sgpo_async.cli import fuzz as command
from sgpo_async.cli.main import main
from sgpo_async.errors import WireError
from sgpo_async.fuzz import codec, run
from sgpo_async.fuzz.corpus import messages
from sgpo_async.fuzz.outcome import refusal
from sgpo_async.wire.records import Message


@pytest.mark.parametrize(
    ("target", "inputs"), [("codec", 4000), ("hub", 3000), ("checkpoint", 60), ("configuration", 60)]
)
def test_changed_inputs_are_refused_or_right(target: str, inputs: int) -> None:
    result = run.attack(target, seed=0, inputs=inputs)
    assert not result.finding, result.finding
    assert sum(result.taken.values()) == result.inputs == inputs
    assert len(result.taken) >= 2, "some are refused and some are valid after all"


def test_the_results_are_written_beside_the_table(tmp_path: Path) -> None:
    assert run.run_fuzz(["codec"], seed=1, inputs=200, to=tmp_path) == 0
    (result,) = json.loads((tmp_path / "fuzz.json").read_text())
    assert sum(result["taken"].values()) == result["inputs"] == 200
    assert "codec" in (tmp_path / "fuzz.txt").read_text()


@pytest.mark.parametrize("target", run.INPUTS)
def test_the_same_seed_gives_the_same_inputs_in_another_process(target: str) -> None:
    """Else nobody could repeat a finding."""
    code = f"from sgpo_async.fuzz.run import attack; print(sorted(attack({target!r}, seed=3, inputs=40).taken.items()))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert printed.stdout.strip() == str(sorted(run.attack(target, seed=3, inputs=40).taken.items()))


def test_memory_that_grows_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that has had more of it before."""
    before = bytearray(2**28)
    del before
    kept: list[bytearray] = []

    def leaking(seed: int, inputs: int, record: Callable[[str], None]) -> None:
        for _ in range(inputs):
            kept.append(bytearray(b"x" * 2**20))
            record("accepted")

    monkeypatch.setattr(codec, "attacks", leaking)
    assert "memory must grow by at most 64 MB, got" in run.attack("codec", seed=0, inputs=200).finding


def test_every_kind_of_message_is_changed() -> None:
    assert {type(message) for message in messages()} == set(get_args(Message))


def test_a_finding_ends_its_target_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("of the codec")

    monkeypatch.setattr(codec, "decode", broken)
    assert main(["fuzz", "codec", "--seed", "9", "--inputs", "50", "--to", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "input 0 of seed 9:" in output and "KeyError: 'of the codec'" in output
    (result,) = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["inputs"] == 0 and "KeyError" in result["finding"]


@pytest.mark.parametrize("text", ["", "two\nlines", "\x1b[2J", "x" * 3000])
def test_an_error_must_be_one_short_line_that_a_terminal_can_show(text: str) -> None:
    with pytest.raises(AssertionError):
        refusal(WireError(text))


def test_the_command_knows_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(command.TARGETS) == set(run.INPUTS)
    assert main(["fuzz", "codex"]) == 2
    assert "fuzz: TARGET must be one of codec, hub, checkpoint, configuration, got 'codex'" in capsys.readouterr().err

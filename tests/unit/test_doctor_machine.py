"""The doctor's checks of this machine, on real faults."""

from __future__ import annotations

import io
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sgpo_async.cli import machine
from sgpo_async.cli.doctor import closing, render
from sgpo_async.cli.main import main
from sgpo_async.config import Run, load
from sgpo_async.engines.sglang.preflight import Finding
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts, model_facts
from sgpo_async.errors import CheckFailed, CheckWarning, DataError, EngineError
from sgpo_async.model.folder import model_folder, stored_parameters
from sgpo_async.weights import digest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo-sglang.yaml"


def settings(*overrides: str) -> Run:
    return load(DEMO, overrides)


def facts_of(folder: str) -> ModelFacts:
    return model_facts(folder, dtype="float32", tp=1, device="cpu", digest=digest)


@pytest.fixture(scope="module")
def cues() -> ModelFacts:
    return facts_of(model_folder("builtin:cues"))


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """A model of terabytes, of which only config.json exists."""
    folder = tmp_path_factory.mktemp("giant")
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 40, "hidden_size": 65536,
        "intermediate_size": 262144, "num_hidden_layers": 16, "num_attention_heads": 512, "num_key_value_heads": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return facts_of(str(folder))


def test_a_free_port_passes_and_a_port_in_use_fails(cues: ModelFacts) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CheckFailed, match=f"another process listens at {address}; choose another port") as failure:
            machine.hub(settings(f"hub.address={address}"), cues)
        assert not isinstance(failure.value, CheckWarning)
    assert machine.hub(settings(f"hub.address={address}"), cues) == f"{address} is free"


def test_an_address_of_another_machine_without_a_hub_fails(cues: ModelFacts, tmp_path: Path) -> None:
    """No machine has an address in 192.0.2.0/24 (RFC 5737)."""
    assert main(["keys", str(tmp_path / "keys")]) == 0
    run = settings("hub.address=tcp://192.0.2.1:5757", f"hub.keys={tmp_path / 'keys'}")
    with pytest.raises(
        CheckFailed, match="is not an address of this machine .*, and no hub answers there; start the hub there"
    ):
        machine.hub(run, cues)


def test_a_model_that_needs_too_much_memory_or_disk_fails(giant: ModelFacts, tmp_path: Path) -> None:
    run = settings(f"out={tmp_path}", "learner.checkpoint_every=5", "learner.keep_checkpoints=3")
    assert machine.parameters(giant) > 10**12
    with pytest.raises(
        CheckFailed, match=f"more than half of .* and {tmp_path} has .*; use a machine with more memory"
    ):
        machine.memory(run, giant)
    with pytest.raises(CheckFailed, match=f"out: {tmp_path} has .*, and 4 checkpoints, the .* GB; free some space"):
        machine.disk(run, giant)
    disk = settings("engine.sglang.transport=disk", f"engine.sglang.folder={tmp_path / 'weights'}")
    with pytest.raises(CheckFailed, match=f"engine.sglang.folder: {tmp_path} has .* 3 versions need .*; free some"):
        machine.weights_folder(disk, giant)
    with pytest.raises(CheckFailed, match=r"largest id is 55, and the model has 40 tokens; use the tokenizer"):
        machine.tokenizer(run, replace(giant, folder=model_folder("builtin:cues")))


def test_a_model_without_a_known_layout_fails(giant: ModelFacts) -> None:
    run = settings("engine.sglang.tp=3")
    with pytest.raises(EngineError, match="engine.sglang.tp: 3 ranks on a cpu cannot share 512 attention heads"):
        machine.model(run, giant)


def test_the_files_of_a_model_hold_as_many_parameters_as_the_model(cues: ModelFacts) -> None:
    """Commands that start without torch count them there."""
    assert stored_parameters("builtin:cues") == machine.parameters(cues)


def test_a_folder_that_cannot_be_written_fails(cues: ModelFacts) -> None:
    with pytest.raises(CheckFailed, match="out: /proc cannot be written .*; set out=DIR"):
        machine.disk(settings("out=/proc/runs"), cues)


@pytest.mark.parametrize(
    ("python", "message"), [("/nowhere/python", "/nowhere/python cannot be run"), (sys.executable, "has no sglang")]
)
def test_a_python_without_sglang_fails(cues: ModelFacts, python: str, message: str) -> None:
    with pytest.raises(CheckFailed, match=f"engine.sglang.python: .*{message}.*; name the Python .*make sglang-cpu"):
        machine.sglang_python(settings(f"engine.sglang.python={python}"), cues)


def test_a_run_that_needs_more_gpus_than_are_visible_fails(cues: ModelFacts) -> None:
    count = torch.cuda.device_count()
    run = settings("engine.device=cuda", f"engine.sglang.servers={count + 1}")
    with pytest.raises(
        CheckFailed, match=f"GPUs: {count} visible, {count + 1} needed by an actor; .*engine.device=cpu"
    ):
        machine.devices(run, cues)


def test_the_embedded_demo_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", str(ROOT / "configs/demo.yaml"), f"out={tmp_path}", "hub.address=tcp://127.0.0.1:0"]
    assert main(arguments) == 0
    assert "nothing failed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_failures_give_exit_code_2_and_are_listed_with_their_remedies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(ROOT / "configs/demo.yaml"), "out=/proc/x", "hub.address=tcp://127.0.0.1:0"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "failed: disk: set out=DIR to a folder that can be written" in lines
    assert lines[-1] == "1 failed", lines
    assert main(["doctor", str(ROOT / "configs/demo.yaml"), f"model.path={tmp_path}/none"]) == 2
    printed = capsys.readouterr().out
    words = " ".join(printed.split())  # where a line of the table is broken depends on the length of the path
    assert "no such folder" in words and "failed: model: set model.path" in words, printed


def test_problems_that_cannot_be_used_are_named(
    cues: ModelFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalid line in the run's file or in a benchmark's, and a run that would hold out every problem."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(f'{{"problem": "{word}", "answer": "1"}}\n' for word in "abc"))
    bad.write_text('{"problem": "a"}\n')
    own = ["tasks.source=file", f"tasks.path={good}", "tasks.held_out=2", "algorithm.objective=grpo"]
    benchmark = f"evaluation.benchmarks.own.path={good}"
    found = f"{good}: 1 problems, 0 with strategies, 0 with responses, 2 held out, own 3"
    assert machine.problems(settings(*own, benchmark), cues) == found
    mistakes = {
        f"tasks.path={bad}": "bad.jsonl:1: no column 'answer'",
        "tasks.held_out=3": "none for training with tasks.held_out=3",
        f"evaluation.benchmarks.own.path={bad}": "bad.jsonl:1: .* layout",
    }
    for mistake, message in mistakes.items():
        with pytest.raises(DataError, match=message):
            machine.problems(settings(*own, mistake), cues)
    overrides = [f"out={tmp_path}", "hub.address=tcp://127.0.0.1:0", *own, "tasks.held_out=3"]
    assert main(["doctor", str(ROOT / "configs/demo.yaml"), *overrides]) == 2
    printed = capsys.readouterr().out
    assert "failed: problems: correct the file" in printed and printed.endswith("\n1 failed\n"), printed
    assert printed.count("correct problems first") == 3, "strategies, prompts, rewards"


def test_the_table_fits_80_columns() -> None:
    sections = {
        "this machine": [Finding("shared memory", "ok", "x" * 200)],
        "server http://127.0.0.1:30000": [
            Finding("version", "warning", "SGLang 9", "go back"),
            Finding("settings", "failed", "tp_size is 1, not 2 [bold]", "set it"),
            Finding("log-probabilities", "not run", "correct settings first"),
            Finding("interface", "ok", "it says \x1b[2J"),
        ],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(sections))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "it says \\x1b[2J" in text and "\x1b" not in text
    assert "tp_size is 1, not 2 [bold]" in text and text.count("x") >= 200
    assert list(closing(sections)) == [
        "failed: server http://127.0.0.1:30000: settings: set it",
        "warning: server http://127.0.0.1:30000: version: go back",
        "1 failed",
    ]

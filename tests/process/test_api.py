"""`from sgpo_async import load_config, train, evaluate`, and the notebook that uses them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sgpo_async import EvaluationResult, TrainResult, evaluate, load_config, train
from sgpo_async.config import load, overridden
from sgpo_async.errors import ConfigError, DataError, Interrupted, RunFailed, SgpoError

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["learner.problems_per_step=4", "tasks.held_out=8", "evaluation.every=100", "local.ranks=1", "local.actors=1"]


def python(program: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Any]]:
    """A run of two steps, and what was told meanwhile."""
    told: list[Any] = []
    run = load_config("builtin:demo", *SMALL, f"out={tmp_path_factory.mktemp('api')}")
    return train(run, "steps=2", "name=small", progress=told.append), told


def test_a_run_returns_what_it_has_left_in_its_folder(trained: tuple[TrainResult, list[Any]]) -> None:
    result, told = trained
    assert [row["step"] for row in result.metrics] == [1, 2] and told == result.metrics
    assert result.summary["ledger"]["trained"] == 8
    assert (result.folder.name, (result.folder / "report.html").is_file()) == ("small", True)
    assert load(result.folder / "config.yaml").steps == 2


def test_a_model_is_evaluated_and_a_second_call_samples_nothing_again(
    trained: tuple[TrainResult, list[Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = load_config("builtin:demo", *SMALL, f"out={tmp_path}")
    first = evaluate(run, model=trained[0].policy, samples={"held-out": 2})
    assert first.folder == tmp_path / "demo" / "evaluation"
    assert first.summary["benchmarks"]["held-out"]["problems"] == 8
    assert [len(row["correct"]) for row in first.problems["held-out"]] == [2] * 8
    capfd.readouterr()
    again = evaluate(run, model=trained[0].policy, samples=2)
    assert isinstance(again, EvaluationResult) and again == first
    assert "1 of 8" not in capfd.readouterr().err


def test_errors_are_exceptions_of_one_line(tmp_path: Path) -> None:
    small = [*SMALL, f"out={tmp_path}"]
    with pytest.raises(ConfigError, match=r"optim.lr must be > 0, got -1"):
        train("builtin:demo", *small, "optim.lr=-1")
    with pytest.raises(ConfigError, match=r"did you mean builtin:demo\?"):
        load_config("builtin:dem")
    with pytest.raises(DataError, match="no such folder"):
        evaluate("builtin:demo", *small, model=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--samples: must be"):
        evaluate("builtin:demo", *small, samples=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunFailed, match="the learner ended with code 1") as failed:
        train(
            "builtin:demo",
            *small,
            "steps=2",
            "model.path=builtin:cues",
            "learner.lora.targets=[x]",
            "learner.lora.rank=2",
        )
    assert isinstance(failed.value, SgpoError) and "learner.lora.targets" in str(failed.value)


def test_a_thread_that_gets_no_signals_is_refused(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def call() -> None:
        try:
            train("builtin:demo", f"out={tmp_path}")
        except ConfigError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "must be called in the main thread" in str(found[0]) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_writes_a_checkpoint_and_the_call_goes_on(tmp_path: Path) -> None:
    """The signal arrives after the first step, as Ctrl-C and a notebook's stop button send it."""
    run = load_config("builtin:demo", *SMALL, f"out={tmp_path}", "steps=1000")

    def interrupt(row: Mapping[str, Any]) -> None:
        if row["step"] == 1:  # a second signal would end it at once
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="add 'learner.resume=true'") as interrupted:
        train(run, progress=interrupt)
    assert interrupted.value.code == 130
    reached = len((tmp_path / "demo" / "metrics.jsonl").read_text().splitlines())
    result = train(run, "learner.resume=true", f"steps={reached + 1}", progress=None)
    assert [row["step"] for row in result.metrics] == list(range(1, reached + 2))


def test_overrides_of_a_configuration_are_those_of_its_file() -> None:
    run = load_config("builtin:demo")
    assert overridden(run, ["builtin:paper", "steps=7"]) == load("builtin:demo", ["builtin:paper", "steps=7"])
    assert overridden(run, []) is run


def test_the_package_is_imported_without_torch_or_the_configuration() -> None:
    heavy = "{'torch', 'transformers', 'omegaconf'} & sys.modules.keys()"
    program = f"import sys, sgpo_async; assert not {heavy}; from sgpo_async import train; assert not {heavy}"
    python(program, ROOT)
    with pytest.raises(ImportError):
        exec("from sgpo_async import nothing")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """Its code cells in their order in one process, with two steps; it is stored without outputs."""
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert "STEPS = 40" in code[0]
    small = ", ".join(f'"{word}"' for word in SMALL)
    code[0] = code[0].replace("STEPS = 40", "STEPS = 2").replace('"name=notebook"', f'"name=notebook", {small}')
    code[1] = code[1].replace("% 5 == 0", "% 1 == 0")
    output = python("\n".join([*code, "print(scores)"]), tmp_path)
    assert output.count("step ") == 2 and "'before'" in output and "'after'" in output

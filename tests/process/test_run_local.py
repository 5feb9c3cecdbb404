"""`launch/local.py` as a user meets it: Ctrl-C, one's own problems, and what can be wrong."""

import json
import signal
import time
from pathlib import Path

import pytest
from run_support import real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with real_run(tmp_path, "steps=1000") as run:
        local = run.local()
        until(run.lines, "training")
        assert len(run.members()) >= 10  # local, guard, hub, torchrun, 2 ranks, 2 actors, 2 nodes, 2 links, ...
        began = time.monotonic()
        local.process.send_signal(signal.SIGINT)
        assert local.ended() == 130
        run.assert_no_trace()
        print(f"all gone {time.monotonic() - began:.1f} s after Ctrl-C")
        assert "Traceback" not in local.output and "stopping" in local.output


def test_own_problems(tmp_path: Path) -> None:
    """The shipped policy does not know their words; the run works nevertheless."""
    problems = tmp_path / "sums.jsonl"
    with problems.open("w") as file:
        for number in range(24):
            problem = {"problem": f"What is {number} + {number + 1}?", "answer": str(2 * number + 1)}
            strategy = {"strategy": "Add the ones, then the tens."} if number % 2 else {}
            print(json.dumps(problem | strategy), file=file)
    words = ("steps=2", "local.actors=1", "local.ranks=1", "tasks.source=file", f"tasks.path={problems}")
    with real_run(tmp_path, *words, "rollout.max_new_tokens=8") as run:
        local = run.local()
        assert local.ended() == 0, local.output
        run.assert_no_trace()
        for line in run.lines():
            assert line["pass_auto"] == 0
            assert line["kd_loss"] == 0
        ledger = run.summary()["ledger"]
        assert ledger["trained"] == 2 * 4
        print(json.dumps(run.lines()[-1]))
        print(local.output[-2000:])

"""A process of a run prints its stacks when it is asked to, and goes on; others are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from run_support import ROOT, until

from sgpo_async.processes.marked import MARK
from sgpo_async.processes.stacks import request_stacks

pytestmark = pytest.mark.process

PROGRAM = """
import sys, time
if sys.argv[1] == "answers":
    from sgpo_async.processes.stacks import print_stacks_on_signal
    print_stacks_on_signal()
print("ready", flush=True)
def waits_for_something():
    while True:
        time.sleep(0.05)
waits_for_something()
"""


def test_only_processes_that_answer_are_asked_and_all_go_on(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    environment = os.environ | {MARK: mark, "PYTHONPATH": str(ROOT)}
    script = tmp_path / "sgpo_async_dummy.py"
    script.write_text(PROGRAM)
    processes, logs = [], {}
    for kind in ("answers", "does not"):
        logs[kind] = tmp_path / kind
        with logs[kind].open("wb") as log:
            processes.append(subprocess.Popen([sys.executable, script, kind], stdout=log, stderr=log, env=environment))
    try:
        for log in logs.values():
            until(lambda log=log: "ready" in log.read_text(), "both processes")
        assert request_stacks(mark) == [f"sgpo_async_dummy.py {processes[0].pid}"]
        until(lambda: "in waits_for_something" in logs["answers"].read_text(), "the stack")
        assert [process.poll() for process in processes] == [None, None]
        assert logs["does not"].read_text() == "ready\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()

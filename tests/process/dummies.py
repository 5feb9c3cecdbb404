"""Dummy hub, learner and actor processes, with which the tests run the real supervisor.

`python dummies.py ROLE BEHAVIOUR FOLDER` is one process; `python dummies.py run FOLDER ROLE=BEHAVIOUR ...` is the
supervisor of a run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def sleep_forever() -> None:
    while True:
        time.sleep(1)


def hub(behaviour: str, folder: Path) -> int:
    if behaviour == "port-taken":
        print("error: hub.address: tcp://127.0.0.1:1 is in use; choose another")
        return 2
    if behaviour == "silent":
        sleep_forever()
    (folder / "hub.json").write_text(json.dumps({"address": "tcp://127.0.0.1:1", "pid": os.getpid()}))
    while not (folder / "finished").exists():
        time.sleep(0.02)
    return 0


def learner(behaviour: str, folder: Path) -> int:
    if behaviour == "crash":
        print("Traceback: something\nerror: problems.jsonl:7: has no answer")
        return 1
    if behaviour == "short":
        while len(list(folder.glob("actor-*.pid"))) < 2:
            time.sleep(0.02)
        (folder / "finished").touch()
        return 0
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, __file__, "worker", "plain", str(folder)], start_new_session=True)
    sleep_forever()
    return 0


def worker(_behaviour: str, folder: Path) -> int:
    """Like a worker of torchrun: the caller starts it in a session of its own, and it ignores SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "worker.pid").write_text(str(os.getpid()))
    sleep_forever()
    return 0


def actor(behaviour: str, folder: Path) -> int:
    (folder / f"actor-{os.getpid()}.pid").touch()
    if behaviour == "crash-once" and not (folder / "crashed").exists():
        (folder / "crashed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "user-error":
        print("error: tasks.prompt: chat, but the tokenizer has no chat template")
        return 2
    while not (folder / "finished").exists() and behaviour != "leave":
        time.sleep(0.02)
    return 0


class Plan:
    actors = 2
    batch_timeout_s = 600.0

    def __init__(self, folder: Path, behaviours: dict[str, str]) -> None:
        self._folder, self._behaviours = folder, behaviours

    def _command(self, role: str) -> list[str]:
        return [sys.executable, __file__, role, self._behaviours.get(role, "plain"), str(self._folder)]

    def hub(self, address: str) -> list[str]:
        return [*self._command("hub"), *([address] if address else [])]

    def learner(self, _address: str) -> list[str]:
        return self._command("learner")

    def actor(self, _name: str, _address: str) -> list[str]:
        return self._command("actor")


class Printer:
    def __init__(self) -> None:
        self._notes = 0

    stalled = ""

    def update(self, supervisor) -> None:
        for note in supervisor.notes[self._notes :]:
            print("note:", note, flush=True)
        self._notes = len(supervisor.notes)

    def close(self, *, stopping: bool) -> None:
        print("closing, stopping:", stopping, flush=True)


def supervise_dummies(folder: Path, behaviours: dict[str, str]) -> int:
    from sgpo_async.errors import SgpoError
    from sgpo_async.local.run_folder import claim
    from sgpo_async.local.supervisor import supervise

    print("ready", flush=True)
    try:
        claim(folder)
        return supervise(Plan(folder, behaviours), folder, Printer(), checkpoint_s=2.0)
    except SgpoError as error:
        print(f"error: {error}", flush=True)
        return 2


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1] == "run":
            behaviours = dict(argument.split("=") for argument in sys.argv[3:])
            raise SystemExit(supervise_dummies(Path(sys.argv[2]), behaviours))
        raise SystemExit(globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))

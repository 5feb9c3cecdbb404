"""Real runs. Each process is started by the command that a user types, and carries a mark in its environment."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from sgpo_async.config import Run, load, to_yaml
from sgpo_async.model.folder import model_folder
from sgpo_async.processes.torchrun import torchrun
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Status, StatusRequest

ROOT = Path(__file__).resolve().parents[2]
MARK = "SGPO_ASYNC_TEST"
PATIENCE_S = 150.0  # timeout of every wait; on a busy machine, importing torch in all processes takes a minute
SMALL = [
    "learner.problems_per_step=4",
    "tasks.held_out=8",
    "evaluation.every=100",
]

Result = TypeVar("Result")


def until(condition: Callable[[], Result], what: str, *, seconds: float = PATIENCE_S) -> Result:
    """Wait until `condition` returns a true value, and return it; `what` describes it in the error."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"timed out after {seconds:g} s; expected: {what}"
        time.sleep(0.02)
    return result


def free_port() -> int:
    """A free port below those that the kernel gives to connections: no other test can be given it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def users_torchrun(ranks: int) -> list[str]:
    """torchrun's arguments as a user gives them: it makes a folder for the errors of its ranks, and shows them."""
    return [word for word in torchrun(ranks)[1:] if not word.startswith("--log-dir")]


class RunProcess:
    """One process of a run; a file receives its output."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Wait until the process ends by itself; return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            tails = [f"== {name}\n{tail}" for name, tail in last_outputs(self.log.parent.parent)]
            raise AssertionError("\n".join([f"{self.name} is still running after {seconds:g} s", *tails])) from None


def last_outputs(directory: Path, characters: int = 2000) -> list[tuple[str, str]]:
    """The ends of what the processes of the run in `directory` have printed or logged, with the names of the files."""
    logs = sorted([*directory.glob("outputs/*.txt"), *directory.glob("run/logs/*.log")])
    return [(log.name, log.read_text(errors="replace")[-characters:]) for log in logs]


def rank_of(learner: RunProcess, number: int, *, attempt: int) -> psutil.Process:
    """The process of this rank in this attempt of torchrun (0: the first), once it runs."""
    expected = {"RANK": str(number), "TORCHELASTIC_RESTART_COUNT": str(attempt)}

    def found() -> psutil.Process | None:
        for child in psutil.Process(learner.process.pid).children():
            with suppress(psutil.Error):  # it has just ended, or has not yet begun
                if expected.items() <= child.environ().items():
                    return child
        return None

    process = until(found, f"rank {number} in attempt {attempt} of {learner.name}", seconds=2 * PATIENCE_S)
    assert process is not None
    return process


class RealRun:
    """The processes of one run, and its folder."""

    def __init__(self, directory: Path, *overrides: str, base: str = "configs/demo.yaml") -> None:
        self.mark = uuid.uuid4().hex
        self.settings: Run = load(ROOT / base, [*SMALL, f"out={directory}", "name=run", *overrides])
        self.folder = Path(self.settings.folder)
        self.config = directory / "config.yaml"
        self.config.write_text(to_yaml(self.settings))
        self.logs = directory / "outputs"
        self.logs.mkdir()
        self._observer: Mailbox | None = None

    def start(self, name: str, *command: str, prefix: Sequence[str] = ()) -> RunProcess:
        """Start a Python program in the checkout; `prefix` precedes the interpreter on the command line."""
        log = self.logs / f"{name}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*prefix, sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return RunProcess(name, process, log)

    def local(self, *overrides: str) -> RunProcess:
        return self.start("local", "launch/local.py", str(self.config), *overrides)

    def resume(self, *overrides: str, steps: int) -> list[dict[str, Any]]:
        """Continue a finished or interrupted run to `steps` steps; return the metrics, which have each step once."""
        resumed = self.local(*overrides, "learner.resume=true", f"steps={steps}")
        assert resumed.wait() == 0, resumed.output
        lines = self.metrics()
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        return lines

    def hub(self, *overrides: str) -> RunProcess:
        return self.start("hub", "-m", "sgpo_async.cli", "hub", str(self.config), *overrides)

    def learner(self, *arguments: str, name: str = "learner", ranks: int = 2) -> RunProcess:
        return self.start(name, *users_torchrun(ranks), "launch/learner.py", str(self.config), *arguments)

    def actor(self, name: str, *arguments: str, hub: str = "") -> RunProcess:
        return self.start(name, "launch/actor.py", "--hub", hub or self.address(), "--name", name, *arguments)

    def address(self) -> str:
        """The hub's address; wait until the hub has written hub.json."""
        return str(until(self._hub_file, "hub.json")["address"])

    def _hub_file(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "hub.json").read_text())
        except FileNotFoundError:
            return {}

    def status(self) -> dict[str, Any]:
        """Request the hub's status."""
        if self._observer is None:
            self._observer = Mailbox(Dealer(self.address(), max_bytes=2**26))
        deadline = time.monotonic() + PATIENCE_S
        self._observer.send(StatusRequest())
        while time.monotonic() < deadline:
            for answer in self._observer.receive(0.1):
                if isinstance(answer, Status):
                    return answer.status
        raise AssertionError("the hub did not answer the status request")

    def actor_row(self, name: str) -> dict[str, Any]:
        """The status of an actor in the hub's list; empty if no actor has this name."""
        return next((row for row in self.status()["actors"] if row["name"] == name), {})

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Every living process of this run, also those whose parent has died."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def processes_with(self, *arguments: str) -> list[psutil.Process]:
        """The processes whose command line has all these arguments."""
        return [process for process in self.processes() if set(arguments) <= set(command_line(process))]

    def assert_cleaned_up(self, seconds: float = PATIENCE_S) -> None:
        """Wait until no process is alive; then hub.json must be gone."""
        until(lambda: not self.processes(), f"end of {self.processes()}", seconds=seconds)
        assert not (self.folder / "hub.json").exists()

    def close(self) -> None:
        if self._observer is not None:
            self._observer.close()
        for process in self.processes():
            process.kill()


def command_line(process: psutil.Process) -> list[str]:
    """The arguments of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def shared_memory() -> set[str]:
    """The names of all files in /dev/shm."""
    return set(os.listdir("/dev/shm"))  # noqa: PTH208


@contextmanager
def real_run(directory: Path, *overrides: str, base: str = "configs/demo.yaml") -> Iterator[RealRun]:
    """A run that must leave no file in /dev/shm; afterwards its remaining processes are killed."""
    before = shared_memory()
    directory.mkdir(exist_ok=True)
    run = RealRun(directory, *overrides, base=base)
    try:
        yield run
        # Some new files may belong to tests that run at the same time; those disappear when the tests end.
        left = {name for name in shared_memory() - before if "sgpo" in name or "torch" in name}
        until(lambda: not left & shared_memory(), f"removal of {left} from /dev/shm")
    finally:
        run.close()


@contextmanager
def suspended(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Suspend these processes within the context, so that its steps may take any time."""
    for process in processes:
        process.suspend()
    yield
    for process in processes:
        process.resume()


def chat_model(folder: Path) -> Path:
    """Copy the shipped policy to `folder` and add a chat template to its tokenizer."""
    shutil.copytree(model_folder("builtin:cues"), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


def assert_all_trained(ledger: dict[str, Any], *, tasks: int, size: int) -> None:
    """The final ledger: `tasks` tasks of `size` rollouts were each trained once, and all others were dropped."""
    for counts, trained in ((ledger, tasks), (ledger["rollouts"], tasks * size)):
        assert counts["trained"] == trained
        assert counts["in_flight"] == counts["buffered"] == 0, counts
        assert counts["dispatched"] == trained + sum(counts["dropped"].values()), counts


def assert_right_weights(summary: dict[str, Any]) -> None:
    """No actor sent anything of weights that the learner never published, and every engine computes as the learner."""
    assert summary["rejected"] == 0, summary
    assert summary["canary"]["alarms"] == {"differs": 0, "stuck": 0, "moved": 0}, summary["canary"]
    assert summary["canary"]["max"] < 1e-4, summary["canary"]

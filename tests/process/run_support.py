"""Real runs: every process a command line as a user types it, found again by a mark in its environment."""

import json
import os
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
PATIENCE_S = 150.0  # for whatever has to happen; a busy machine needs a minute to import torch everywhere
SMALL = [
    "learner.problems_per_step=4",
    "tasks.held_out=8",
    "evaluation.every=100",
]

Found = TypeVar("Found")


def until(look: Callable[[], Found], what: str, *, seconds: float = PATIENCE_S) -> Found:
    """Look until there is something to see; return it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for: {what}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Started:
    """One process of a run, with its output in a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on for {seconds:g} s:\n{self.output[-3000:]}") from None


def rank_of(learner: Started, number: int, *, attempt: int) -> psutil.Process:
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

    def __init__(self, place: Path, *words: str, base: str = "configs/demo.yaml") -> None:
        self.mark = uuid.uuid4().hex
        self.run: Run = load(ROOT / base, [*SMALL, f"out={place}", "name=run", *words])
        self.folder = Path(self.run.folder)
        self.config = place / "config.yaml"
        self.config.write_text(to_yaml(self.run))
        self.logs = place / "outputs"
        self.logs.mkdir()
        self._observer: Mailbox | None = None

    def start(self, name: str, *command: str, before: Sequence[str] = ()) -> Started:
        """Start a Python program in the checkout; `before` is put before the interpreter."""
        log = self.logs / f"{name}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*before, sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return Started(name, process, log)

    def local(self, *words: str) -> Started:
        return self.start("local", "launch/local.py", str(self.config), *words)

    def hub(self, *words: str) -> Started:
        return self.start("hub", "-m", "sgpo_async.cli", "hub", str(self.config), *words)

    def learner(self, *words: str, name: str = "learner", ranks: int = 2) -> Started:
        return self.start(name, *torchrun(ranks)[1:], "launch/learner.py", str(self.config), *words)

    def actor(self, name: str, *words: str, hub: str = "") -> Started:
        return self.start(name, "launch/actor.py", "--hub", hub or self.address(), "--name", name, *words)

    def address(self) -> str:
        """The hub's, once it has told."""
        return str(until(self._hub_file, "hub.json")["address"])

    def _hub_file(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "hub.json").read_text())
        except FileNotFoundError:
            return {}

    def status(self) -> dict[str, Any]:
        """What the hub says now."""
        if self._observer is None:
            self._observer = Mailbox(Dealer(self.address(), max_bytes=2**26))
        asked = time.monotonic()
        self._observer.send(StatusRequest())
        while time.monotonic() - asked < PATIENCE_S:
            for answer in self._observer.receive(0.1):
                if isinstance(answer, Status):
                    return answer.status
        raise AssertionError("the hub gives no status")

    def actor_row(self, name: str) -> dict[str, Any]:
        """The hub's knowledge of an actor; empty if it knows none of this name."""
        return next((row for row in self.status()["actors"] if row["name"] == name), {})

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def members(self) -> list[psutil.Process]:
        """Every living process of this run, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def with_words(self, *words: str) -> list[psutil.Process]:
        """Those whose command line has all these words."""
        return [process for process in self.members() if set(words) <= set(_words(process))]

    def assert_no_trace(self, seconds: float = PATIENCE_S) -> None:
        """No process, no shared memory, no hub.json."""
        until(lambda: not self.members(), f"the end of {self.members()}", seconds=seconds)
        assert not (self.folder / "hub.json").exists()

    def close(self) -> None:
        if self._observer is not None:
            self._observer.close()
        for process in self.members():
            process.kill()


def _words(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))  # noqa: PTH208


@contextmanager
def real_run(place: Path, *words: str, base: str = "configs/demo.yaml") -> Iterator[RealRun]:
    """A run whose processes are all gone afterwards, with what they had in /dev/shm."""
    before = shared_memory()
    place.mkdir(exist_ok=True)
    run = RealRun(place, *words, base=base)
    try:
        yield run
        # Other tests run at the same time: what is theirs goes when they end, what is ours has to be gone or stays.
        left = {name for name in shared_memory() - before if "sgpo" in name or "torch" in name}
        until(lambda: not left & shared_memory(), f"the end of {left} in /dev/shm")
    finally:
        run.close()


@contextmanager
def paused(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Within this context these processes stand still: what follows can take its time."""
    for process in processes:
        process.suspend()
    yield
    for process in processes:
        process.resume()


def chat_model(place: Path) -> Path:
    """A copy of the shipped policy, whose tokenizer differs by a chat template."""
    shutil.copytree(model_folder("builtin:cues"), place)
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return place


def assert_all_trained(ledger: dict[str, Any], *, tasks: int, size: int) -> None:
    """At the end of a run: so many tasks of `size` rollouts are trained, each once; all others were dropped."""
    for book, trained in ((ledger, tasks), (ledger["rollouts"], tasks * size)):
        assert book["trained"] == trained
        assert book["in_flight"] == book["buffered"] == 0, book
        assert book["dispatched"] == trained + sum(book["dropped"].values()), book

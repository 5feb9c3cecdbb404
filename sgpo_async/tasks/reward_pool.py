"""Computes rewards of completions in worker processes without blocking the caller.

    caller ── submit ─▶ requests ─▶ thread 1..n ── stdin/stdout ── worker process 1..n
    caller ◀── poll ── verdicts ◀──────┘
           ◀─────────── inline verifiers, at submit

Each thread waits for a request, then for its worker's answer. A worker that exceeds the time limit is killed by its
alarm (see `reward_worker`), or by its thread if the verifier has disabled the alarm, and the thread starts a new one.
The caller waits only in `poll`. A reward function that raises or returns no number ends the pool with an error, because
it would be wrong to train on. One that ends its process has reward 0, and a line in the log. A verifier that ends its
process or exceeds the limit again and again, in every worker and for different problems, ends the pool with an error:
without it the run would wait for a batch until that times out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sgpo_async.errors import SgpoError
from sgpo_async.tasks.reward_worker import OUT_OF_MEMORY, READY, STARTUP_LIMIT_S
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.verify import INLINE, VERIFIERS

log = logging.getLogger(__name__)

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
WATCH_S = 0.5  # how often a thread looks whether its worker has ended
GRACE_S = 10.0  # after its time limit, for a worker's alarm to kill it
TIMEOUTS = 8  # timeouts in a row, per worker, ...
ANSWERS = 4  # ... for so many different answers, after which a verifier counts as one that never returns


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The reward of the completion submitted under `key`; 0 if its time or memory limit was exceeded."""

    key: Hashable
    reward: float  # of an episode with an environment: of all turns so far
    timed_out: bool = False  # exceeded the limit of time or memory, or ended the worker
    reply: str | None = None  # of an environment: what the policy reads next; None: it is over


@dataclass(frozen=True, kw_only=True)
class _Request:
    key: Hashable
    verifier: str
    sample: Sample
    earlier: Sequence[str] | None  # completions of the episode, if the verifier is an environment


@dataclass
class TimeoutStreak:
    """The timeouts since the last verdict in time. Those of one problem alone are not hopeless: its answer may hang."""

    verifier: str = ""
    count: int = 0
    answers: set[str] = field(default_factory=set)

    def record(self, verifier: str, answer: str, *, timed_out: bool) -> None:
        """Count the verdict on a completion."""
        if not timed_out or verifier != self.verifier:
            self.verifier, self.count, self.answers = verifier, 0, set()
        if timed_out:
            self.count += 1
            self.answers.add(answer)

    def is_hopeless(self, *, workers: int) -> bool:
        """Whether the verifier seems never to return."""
        return self.count >= TIMEOUTS * workers and len(self.answers) >= ANSWERS


class RewardPool:
    """Runs reward functions in worker processes (cheap ones inline), with limits for each completion.

    Args:
        limit_s: limit of time in seconds.
        memory_mb: limit of each worker's memory; 0: none.
    """

    def __init__(self, *, workers: int, limit_s: float, memory_mb: int = 0) -> None:
        assert workers >= 1 and limit_s > 0 and memory_mb >= 0
        self.timeouts = 0
        self._workers, self._limit_s, self._memory_mb = workers, limit_s, memory_mb
        self._streak = TimeoutStreak()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict | tuple[_Request, Verdict] | SgpoError] = queue.SimpleQueue()
        self._closing = False
        self._lock = threading.Lock()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(workers)]
        self._started = False

    def submit(self, key: Hashable, verifier: str, sample: Sample, *, earlier: Sequence[str] | None = None) -> None:
        """Submit a completion and return at once. The verdict of an inline verifier is available immediately.

        Args:
            verifier: the text form of a reward (see `sgpo_async.tasks.rewards`), or an environment.
            earlier: the earlier completions of the episode, if the verifier is an environment.
        """
        if verifier in INLINE:
            correct = VERIFIERS[verifier](sample.answer, sample.completion)
            self._verdicts.put(Verdict(key=key, reward=float(correct)))
            return
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        self._requests.put(_Request(key=key, verifier=verifier, sample=sample, earlier=earlier))

    def poll(self, timeout_s: float = 0.0) -> list[Verdict]:
        """The available verdicts, after waiting at most `timeout_s` seconds for the first one.

        Raises SgpoError if a reward function is at fault, if a worker failed for another reason than its limits, or if
        a verifier never returns.
        """
        verdicts: list[Verdict] = []
        try:
            item = self._verdicts.get(timeout=timeout_s) if timeout_s > 0 else self._verdicts.get_nowait()
            while True:
                if isinstance(item, SgpoError):
                    raise item
                verdicts.append(self._counted(*item) if isinstance(item, tuple) else item)
                item = self._verdicts.get_nowait()
        except queue.Empty:
            return verdicts

    def _counted(self, request: _Request, verdict: Verdict) -> Verdict:
        """The verdict of a worker; raises SgpoError if it is the last of a hopeless streak."""
        self.timeouts += verdict.timed_out
        streak = self._streak
        streak.record(request.verifier, request.sample.answer, timed_out=verdict.timed_out)
        if streak.is_hopeless(workers=self._workers):
            raise SgpoError(
                f"reward {streak.verifier}: none of the last {streak.count} completions was judged within "
                f"tasks.reward_limit_s={self._limit_s:g} by {self._workers} workers (tasks.reward_workers, "
                f"tasks.reward_memory_mb={self._memory_mb}); correct the verifier or the answers, or raise the limits"
            )
        return verdict

    def close(self) -> None:
        """Kill the workers; open requests get no verdict."""
        with self._lock:
            self._closing = True
            for process in self._processes.values():
                _kill(process)
        if self._started:
            for _ in self._threads:
                self._requests.put(None)
            for thread in self._threads:
                thread.join(timeout=5.0)
        for process in list(self._processes.values()):  # a thread may still remove one
            # A killed process that still exists is stuck in the kernel; an error that ends this one may be on its way.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5.0)

    def _serve(self, index: int) -> None:
        while (request := self._requests.get()) is not None:
            known = self._processes.get(index)
            try:
                process = known or self._start(index)
            except OSError as error:
                self._verdicts.put(SgpoError(f"reward worker: cannot be started: {error}"))
                return
            if process is None:
                return
            self._verdicts.put(self._judge(process, request, index=index, ready=known is not None))

    def _start(self, index: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._closing:
                return None
            command = [sys.executable, "-m", "sgpo_async.tasks.reward_worker", str(self._limit_s), str(self._memory_mb)]
            paths = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            pipe = subprocess.PIPE
            self._processes[index] = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
            )
            return self._processes[index]

    def _judge(
        self, process: subprocess.Popen[str], request: _Request, *, index: int, ready: bool
    ) -> tuple[_Request, Verdict] | SgpoError:
        assert process.stdin is not None and process.stdout is not None
        one, answer = request.sample, b""
        line = json.dumps(
            [request.verifier, one.problem, one.answer, one.completion, dict(one.columns), request.earlier]
        )
        if ready := ready or _answer(process, STARTUP_LIMIT_S + GRACE_S) == READY.encode():
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = _answer(process, STARTUP_LIMIT_S + self._limit_s + GRACE_S)  # it may import the user's module
        if answer:
            try:
                verdict = json.loads(answer)
                known = "error" not in verdict
                return (request, Verdict(key=request.key, **verdict)) if known else SgpoError(verdict["error"])
            except (ValueError, TypeError) as error:
                log.warning("reward %s: its worker's answer is no verdict (%s): reward 0", request.verifier, error)
                process.kill()
        status = _end(process)
        with self._lock:
            del self._processes[index]
        if status >= 0 and not ready:
            return SgpoError(f"reward worker: exit status {status} before its first request; see its traceback")
        if status >= 0 and status != OUT_OF_MEMORY:  # else it was killed by its alarm, by this thread or by others
            log.warning("reward %s: ended its process with status %d: reward 0", request.verifier, status)
        return request, Verdict(key=request.key, reward=0.0, timed_out=True)


def _answer(process: subprocess.Popen[str], timeout_s: float) -> bytes:
    """The next line of a worker; b"" if it has ended, or sends no whole line in time: then it is killed.

    What it has started may have its stdout and never close it, so the end of the worker counts, not that of the file.
    """
    assert process.stdout is not None
    answer, deadline = b"", time.monotonic() + timeout_s
    while not answer.endswith(b"\n"):
        ended = process.poll() is not None  # before the look: what it has sent is there then
        if _readable(process.stdout, 0.0 if ended else WATCH_S):
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return b""
            answer += part
        elif ended:
            return b""
        if time.monotonic() > deadline and not answer.endswith(b"\n"):
            process.kill()
            return b""
    return answer


def _end(process: subprocess.Popen[str]) -> int:
    """The exit status of a worker that answers no more; what it has started ends with it."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _kill(process)
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a worker and all that it has started, which is in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _readable(file: IO[str], timeout_s: float) -> bool:
    """Whether there is something to read, or the end of the file, within `timeout_s`."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(1000 * timeout_s))

"""Verifies completions in worker processes without blocking the caller.

    caller ── submit ─▶ requests ─▶ thread 1..n ── stdin/stdout ── worker process 1..n
    caller ◀── poll ── verdicts ◀──────┘
           ◀─────────── inline verifiers, at submit

Each thread waits for a request, then for its worker's answer. A worker that exceeds the time limit is killed by its
alarm (see `reward_worker`), and the thread starts a new one. The caller waits only in `poll`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.errors import SgpoError
from sgpo_async.tasks.verify import INLINE, VERIFIERS

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the completion submitted under `key` is correct; a timeout counts as incorrect."""

    key: Hashable
    correct: bool
    timed_out: bool = False


@dataclass(frozen=True, kw_only=True)
class _Request:
    key: Hashable
    line: str


class RewardPool:
    """Runs verifiers in worker processes (cheap ones inline), with a time limit in seconds per completion."""

    def __init__(self, *, workers: int, limit_s: float) -> None:
        assert workers >= 1 and limit_s > 0
        self.timeouts = 0
        self._limit_s = limit_s
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict | SgpoError] = queue.SimpleQueue()
        self._closing = False
        self._lock = threading.Lock()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(workers)]
        self._started = False

    def submit(self, key: Hashable, verifier: str, answer: str, completion: str) -> None:
        """Submit `completion` and return at once. The verdict of an inline verifier is available immediately."""
        assert verifier in VERIFIERS, verifier
        if verifier in INLINE:
            self._verdicts.put(Verdict(key=key, correct=VERIFIERS[verifier](answer, completion)))
            return
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        self._requests.put(_Request(key=key, line=json.dumps([verifier, answer, completion])))

    def poll(self, timeout_s: float = 0.0) -> list[Verdict]:
        """The available verdicts, after waiting at most `timeout_s` seconds for the first one.

        Raises SgpoError if a worker failed for another reason than its time limit.
        """
        verdicts: list[Verdict] = []
        try:
            item = self._verdicts.get(timeout=timeout_s) if timeout_s > 0 else self._verdicts.get_nowait()
            while True:
                if isinstance(item, SgpoError):
                    raise item
                self.timeouts += item.timed_out
                verdicts.append(item)
                item = self._verdicts.get_nowait()
        except queue.Empty:
            return verdicts

    def close(self) -> None:
        """Kill the workers; open requests get no verdict."""
        with self._lock:
            self._closing = True
            for process in self._processes.values():
                process.kill()
        if self._started:
            for _ in self._threads:
                self._requests.put(None)
            for thread in self._threads:
                thread.join(timeout=5.0)
        for process in self._processes.values():
            process.wait(timeout=5.0)

    def _serve(self, index: int) -> None:
        while (request := self._requests.get()) is not None:
            process = self._processes.get(index) or self._start(index)
            if process is None:
                return
            self._verdicts.put(self._judge(process, request, index=index))

    def _start(self, index: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._closing:
                return None
            command = [sys.executable, "-m", "sgpo_async.tasks.reward_worker", str(self._limit_s)]
            paths = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            pipe = subprocess.PIPE
            self._processes[index] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            return self._processes[index]

    def _judge(self, process: subprocess.Popen[str], request: _Request, *, index: int) -> Verdict | SgpoError:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.line + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return Verdict(key=request.key, correct=json.loads(line))
        status = process.wait()
        process.stdout.close()
        with self._lock:
            del self._processes[index]
        if status < 0:  # killed by its alarm or by another process
            return Verdict(key=request.key, correct=False, timed_out=True)
        return SgpoError(f"reward worker: exit status {status} on {request.key!r}; see its traceback")

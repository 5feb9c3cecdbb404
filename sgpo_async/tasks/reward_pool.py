"""Judges completions without holding up its caller.

    caller ── submit ─▶ requests ─▶ thread 1..n ── stdin/stdout ── worker process 1..n
    caller ◀── poll ── verdicts ◀──────┘
           ◀─────────── inline verifiers, at submit

A thread waits for a request, then for its worker's answer, which comes within the time limit or the worker
is dead (see `reward_worker`); a dead worker is replaced. The caller waits in `poll` alone.
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
    """The judgement on the completion submitted under `key`; one that timed out counts as incorrect."""

    key: Hashable
    correct: bool
    timed_out: bool = False


@dataclass(frozen=True, kw_only=True)
class _Request:
    key: Hashable
    line: str


class RewardPool:
    """Verifiers in worker processes (cheap ones inline), with a time limit in seconds for each completion."""

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
        """Have `completion` judged; returns at once (an inline verifier's verdict is then already there)."""
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
        """Verdicts that are there, after waiting at most `timeout_s` seconds for the first.

        Raises SgpoError if a worker failed otherwise than by its time limit.
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
        """Kill the workers; requests still open get no verdict."""
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
        if status < 0:  # by its alarm, or by a kill from outside
            return Verdict(key=request.key, correct=False, timed_out=True)
        return SgpoError(f"reward worker: exit status {status} on {request.key!r}; see its traceback")

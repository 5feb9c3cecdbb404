"""Runs jobs in processes, one core each. A failed job ends the experiment with its error; earlier results are kept.

jobs ─▶ worker 1 ... n (spawned once: importing torch takes seconds) ─▶ (job, result), as they finish
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sgpo_async.errors import SgpoError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Pool:
    """`workers` processes that each run one job at a time."""

    def __init__(self, workers: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the children, which read it when they import torch
        context = multiprocessing.get_context("spawn")
        self._workers = workers
        self._executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_the_parent)

    def run(
        self, work: Callable[[Job], Result], jobs: Sequence[Job], *, while_: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[Job, Result]]:
        """Yields each job with its result when it finishes; starts no more jobs once `while_` returns False.

        Raises SgpoError if a worker died (killed, or out of memory), and any exception of a job.
        """
        waiting = deque(jobs)
        running: dict[Future[Result], Job] = {}
        try:
            while running or (waiting and while_()):
                while waiting and len(running) < self._workers and while_():
                    job = waiting.popleft()
                    running[self._executor.submit(work, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise SgpoError(
                "experiment: a worker process died; free memory or use fewer --workers, then run it again"
            ) from None

    def close(self) -> None:
        """End the workers; running jobs are abandoned."""
        for process in list(self._executor._processes.values()):  # Python 3.14 has terminate_workers
            process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _follow_the_parent() -> None:
    """In a worker: ignore Ctrl-C, which the parent handles, and exit when the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

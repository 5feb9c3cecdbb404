"""Worker process of the reward pool: one request per line on stdin, one verdict per line on stdout.

The first line on stdout is READY. A request is the JSON list [reward, problem, answer, completion, columns, earlier]
with the text form of a reward (see `sgpo_async.tasks.rewards`), or with the name of an environment and the episode's
earlier completions, which are null for a reward. A verdict is {"reward": number}, with "reply" for a turn that does not
end its episode, or {"error": text} if the user's code is at fault.

When its parent ends, an idle worker ends at once (end of stdin), and a busy one at the latest when its time limit
expires. It leads a process group, with which the processes end that the user's code has started. The time limit is
SIGALRM with its default action, so the kernel kills any loop, in Python or in C. A request that needs more memory than
the limit ends the worker with OUT_OF_MEMORY.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

STARTUP_LIMIT_S = 60.0
OUT_OF_MEMORY = 77  # exit code
READY = "ready\n"


def serve(limit_s: float) -> None:
    """Answer requests until stdin ends. SIGALRM kills the process if a request takes more than `limit_s` seconds."""
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep prints of libraries out of the verdicts
    requests = os.fdopen(os.dup(sys.stdin.fileno()))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())  # user's code, or what it starts, could read the next request

    from sgpo_async.errors import DataError
    from sgpo_async.tasks.environments import load_environment, play
    from sgpo_async.tasks.rewards import Sample, load_reward
    from sgpo_async.tasks.verify import VERIFIERS

    @cache
    def load(text: str, *, environment: bool) -> Callable[[Sample, list[str]], dict[str, object]]:
        """The function from a completion and the earlier ones to a verdict; imports the user's module."""
        if not environment:
            reward = load_reward(text)
            return lambda sample, _: {"reward": reward(sample)}
        make = load_environment(text)

        def judge(sample: Sample, earlier: list[str]) -> dict[str, object]:
            turn = play(text, make, sample, earlier)
            return {"reward": turn.reward} | ({} if turn.done else {"reply": turn.reply})

        return judge

    VERIFIERS["math"]("1", "1")  # imports everything before the first time limit starts
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    print(READY, end="", file=verdicts, flush=True)
    worker = os.getpid()
    for line in requests:
        text, problem, answer, completion, columns, earlier = json.loads(line)
        sample = Sample(problem=problem, answer=answer, completion=completion, columns=columns)
        try:
            signal.setitimer(signal.ITIMER_REAL, STARTUP_LIMIT_S)
            judge = load(text, environment=earlier is not None)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = judge(sample, earlier)
        except DataError as error:
            verdict = {"error": str(error)}
        if os.getpid() != worker:
            os._exit(0)  # user's code has forked, and this is the child: it must not answer, too
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(verdict), file=verdicts, flush=True)


def limit_memory(megabytes: int) -> None:
    """Limit the private memory of this process; 0: no limit."""
    if megabytes:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes * 2**20, megabytes * 2**20))


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.setitimer(signal.ITIMER_REAL, STARTUP_LIMIT_S)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    limit_memory(int(sys.argv[2]))
    try:
        serve(float(sys.argv[1]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # without clean-up, which needs memory
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # stdin has ended: so shall what user's code has left behind

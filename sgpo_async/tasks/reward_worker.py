"""Worker process of the reward pool: one request per line on stdin, one verdict per line on stdout.

A request is the JSON list [verifier, answer, completion], a verdict `true` or `false`. When
its parent ends, an idle worker ends at once (end of stdin), and a busy one at the latest when its time limit expires.
The limit is SIGALRM with its default action, so the kernel kills any loop, in Python or in C.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

STARTUP_LIMIT_S = 60.0


def serve(limit_s: float) -> None:
    """Answer requests until stdin ends. SIGALRM kills the process if a request takes more than `limit_s` seconds."""
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep prints of libraries out of the verdicts

    from sgpo_async.tasks.verify import VERIFIERS

    VERIFIERS["math"]("1", "1")  # imports everything before the first time limit starts
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for line in sys.stdin:
        verifier, answer, completion = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        verdict = VERIFIERS[verifier](answer, completion)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.setitimer(signal.ITIMER_REAL, STARTUP_LIMIT_S)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    serve(float(sys.argv[1]))

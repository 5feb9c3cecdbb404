"""Worker process of the reward pool: one request per line on stdin, one verdict per line on stdout.

A request is the JSON list [verifier, answer, completion], a verdict `true` or `false`. The process ends with
its parent: at once while it waits (end of stdin), and otherwise when the time limit of the item in hand has
passed. The limit is the kernel's alarm at its default action: no loop, in Python or in C, outlives it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

STARTUP_LIMIT_S = 60.0


def serve(limit_s: float) -> None:
    """Judge requests until stdin ends, each within `limit_s` seconds or the process is killed by SIGALRM."""
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints is taken for a verdict

    from sgpo_async.tasks.verify import VERIFIERS

    VERIFIERS["math"]("1", "1")  # pays for the imports before the first limit runs
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for line in sys.stdin:
        verifier, answer, completion = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        verdict = VERIFIERS[verifier](answer, completion)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.setitimer(signal.ITIMER_REAL, STARTUP_LIMIT_S)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    serve(float(sys.argv[1]))

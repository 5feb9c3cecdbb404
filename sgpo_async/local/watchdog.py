"""Ends a run whose supervisor has died, even by `kill -9`.

    supervisor ──stdin, held open, never written──▶ watchdog

It waits for the end of its standard input, which the kernel closes when the supervisor dies, in whatever way. The
watchdog runs in its own session, so that a Ctrl-C at the terminal does not reach it. With `kill` it ends the processes
by SIGKILL only, so that they do not tell actors that the run is over.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from sgpo_async.local.run_folder import forget_hub
from sgpo_async.processes.marked import end_run, kill_run


def main() -> None:
    """`python -m sgpo_async.local.watchdog MARK FOLDER end|kill`."""
    mark, folder, how = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    (kill_run if how == "kill" else end_run)(mark)
    forget_hub(Path(folder))


if __name__ == "__main__":
    main()

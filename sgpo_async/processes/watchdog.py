"""Run a command that must not outlive the process that started it, even if that process is killed by `kill -9`.

    parent ──stdin, kept open, never written──▶ watchdog ──▶ command and its children, one process group

The parent starts it by path, `python watchdog.py COMMAND ...`, as the leader of a new session. It needs only Python's
standard library. When standard input or the command ends, the watchdog kills the whole process group, because a server
that is killed leaves its scheduler process behind.
"""

import os
import select
import signal
import subprocess
import sys
import time

TICK_S = 0.1


def main() -> None:
    """Run the command until it ends or standard input is closed, then kill the process group."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while command.poll() is None:
        if select.select([0], [], [], TICK_S)[0] and not os.read(0, 1):
            break
    else:
        code = command.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"the server's main process ended: {how}", flush=True)
        time.sleep(TICK_S)  # its children may still write to the log
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

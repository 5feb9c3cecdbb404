"""Runs a command that must not outlive the process that started it, even one killed by `kill -9`.

    parent ──stdin, held open, never written──▶ watchdog ──▶ command and its children, one process group

Run by path: `python watchdog.py COMMAND ...`, as the leader of a session of its own. It needs Python's standard library
alone. When its input or the command ends, it kills the whole process group: a server that is killed leaves its
scheduler behind.
"""

import os
import select
import signal
import subprocess
import sys
import time

TICK_S = 0.1


def main() -> None:
    """Run the command to its end, or to the end of standard input."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while command.poll() is None:
        if select.select([0], [], [], TICK_S)[0] and not os.read(0, 1):
            break
    else:
        code = command.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"the server's main process ended: {how}", flush=True)
        time.sleep(TICK_S)  # its children's last words
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

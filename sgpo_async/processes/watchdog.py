"""Holds one server's process group, so that it never outlives its actor, be that killed by `kill -9`.

    actor ──stdin, held open, never written──▶ keeper ──▶ server and its children, one process group

Run by path, with the standard library alone. It ends when its input does or when the server does, and takes the whole
group along: a server that is killed leaves its scheduler behind.
"""

import os
import select
import signal
import subprocess
import sys
import time

TICK_S = 0.1


def main() -> None:
    """`python keeper.py COMMAND ...`, as the leader of a session of its own."""
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while server.poll() is None:
        if select.select([0], [], [], TICK_S)[0] and not os.read(0, 1):
            break
    else:
        code = server.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"the server's main process ended: {how}", flush=True)
        time.sleep(TICK_S)  # its children's last words
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

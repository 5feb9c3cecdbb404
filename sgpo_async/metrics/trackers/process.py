"""The process of one tracker: `python -m sgpo_async.metrics.trackers.process KIND FOLDER`.

It follows the run until its standard input ends, and then has END_S to write the rest. A word before that end says how
the run has ended: FINISHED or INTERRUPTED; without one, the learner was killed. On standard output it prints events,
one JSON object a line; what the tracker's package prints is dropped.

    {"event": "note" | "failed", "text": ...}               at most one of each
    {"event": "end", "missing": steps, "failures": count}   at the end, unless it took longer than END_S
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from sgpo_async.metrics.trackers.base import END_S, FINISHED
from sgpo_async.metrics.trackers.follow import Follower, sole_writer

TICK_S = 0.5
NICE = 10  # training comes first


def main() -> None:
    """Follow the run to its end."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    os.nice(NICE)
    events = _own_output()
    # The process of a killed learner may still write its last steps.
    with sole_writer(folder, kind, patience_s=2 * END_S) as alone:
        if not alone:
            _tell(events, event="failed", text=f"another process writes {folder} to it")
            sys.exit(1)
        follower = Follower(kind, folder)
        ending = _follow(follower, events)
        signal.alarm(int(END_S))  # ends the process, wherever it hangs
        follower.finish(finished=ending == FINISHED)
        _tell(events, event="end", missing=follower.missing(), failures=follower.failures, text=follower.failure)
    os._exit(0)  # without the clean-up of the tracker's package, which may wait for the network


def _follow(follower: Follower, events: TextIO) -> bytes:
    """Write what is new until standard input ends; return what it has said."""
    said, word = set(), b""
    while True:
        follower.advance()
        for event, text in (("note", follower.note), ("failed", follower.failure)):
            if text and event not in said:
                said.add(event)
                _tell(events, event=event, text=text)
        if select.select([0], [], [], TICK_S)[0]:
            more = os.read(0, 64)
            if not more:
                return word
            word += more


def _own_output() -> TextIO:
    """Standard output as a file for events; the descriptors 1 and 2 then lead nowhere."""
    events = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return events


def _tell(events: TextIO, **event: object) -> None:
    with suppress(OSError):  # the learner was killed
        print(json.dumps(event), file=events, flush=True)


if __name__ == "__main__":
    main()

"""Signals of a learner rank: the first one asks, the second one ends, also while the main thread is in library code."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

PATIENCE_S = 120.0
# The main thread waits in a C function that runs no Python handler until it returns.
RANK = """
import ctypes, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup lets its children ignore it
from sgpo_async.processes.signals import SAME_S, UrgentSignals
with UrgentSignals(in_order=lambda: {in_order}) as signals:
    print("ready", SAME_S, flush=True)
    {wait}
    print("ended by itself:", signals.reason, flush=True)
"""
IN_C = "[ctypes.CDLL(None).sleep(3600) for _ in range(1000)]"  # every signal interrupts one of them
IN_PYTHON = "\n    while not signals.stop: time.sleep(0.01)"


class Rank:
    def __init__(self, wait: str, *, in_order: bool = True) -> None:
        code = RANK.format(wait=wait, in_order=in_order)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        word, self.same_s = self.process.stdout.readline().split()
        assert word == "ready"

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.process.kill()
        rank.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks(ranks: list[Rank], number: signal.Signals) -> None:
    ranks.append(rank := Rank(IN_PYTHON))
    rank.process.send_signal(number)
    assert rank.end() == (0, f"ended by itself: received {number.name}\n")


def test_a_second_signal_ends_a_process_that_waits_in_library_code(ranks: list[Rank]) -> None:
    """One that comes with the first is the same: a job manager signals torchrun, which forwards it, and its ranks."""
    ranks.append(rank := Rank(IN_C))
    rank.process.send_signal(signal.SIGTERM)
    rank.process.send_signal(signal.SIGTERM)
    time.sleep(float(rank.same_s) + 0.5)
    assert rank.process.poll() is None
    for _ in range(600):  # on a busy machine its thread may notice the first signal late, and take this one for it
        if rank.process.poll() is None:
            rank.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
    assert rank.end() == (128 + signal.SIGINT, "")


def test_a_process_that_cannot_end_in_good_order_ends_at_once(ranks: list[Rank]) -> None:
    ranks.append(rank := Rank(IN_C, in_order=False))
    rank.process.send_signal(signal.SIGTERM)
    assert rank.end() == (128 + signal.SIGTERM, "")

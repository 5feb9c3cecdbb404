"""The live picture at a real terminal, tmux: it follows the terminal's size, and leaves the screen as it was."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_support import ROOT, until

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, a terminal whose size a test can change"),
]
PROGRAM = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
from rich.console import Console
from test_cli_display import view_at
from sgpo_async.local.live import display_on
print("before the display")
display, step = display_on(Console(markup=False, emoji=False)), 0
while not Path(sys.argv[2]).exists():
    step = step % 119 + 1
    if step == 1:
        print("a line of the log", file=sys.stderr)
    display.show(view_at(step, notes=["the only note"]))
    time.sleep(0.05)
display.close()
display.close()
print("after the display", flush=True)
time.sleep(600)
"""


class Terminal:
    """One window of a tmux server of its own."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def tmux(self, *command: str) -> str:
        whole = ["tmux", "-S", str(self._socket), "-f", "/dev/null", *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=True).stdout

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-x", str(width), "-y", str(height))

    def screen(self, *, history: bool = False) -> list[str]:
        return self.tmux("capture-pane", "-p", *(["-S", "-"] if history else [])).splitlines()


@contextmanager
def terminal(tmp_path: Path, width: int, height: int, program: str) -> Iterator[Terminal]:
    found = Terminal(tmp_path / "tmux")
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [
        "env",
        f"PYTHONPATH={ROOT}",
        "TERM=screen-256color",
        "LC_ALL=C.UTF-8",
        "COLUMNS=80",
        sys.executable,
        str(script),
    ]
    command += [str(ROOT / "tests/unit"), str(tmp_path / "stop")]
    found.tmux("-u", "new-session", "-d", "-x", str(width), "-y", str(height), *command)
    try:
        yield found
    finally:
        found.tmux("kill-server")


def one_picture(rows: list[str]) -> bool:
    """Whether there is exactly one, with each part once."""
    parts = ("demo  training", "pass rate", "mean alpha", "actor-1.2", "the only note")
    return all(sum(part in row for row in rows) == 1 for part in parts)


def fits(terminal: Terminal, width: int) -> bool:
    """Whether the first line ends at the right edge: the picture was drawn for this width."""
    rows = terminal.screen()
    return any(len(row) == width and row.startswith("demo  training") for row in rows) and one_picture(rows)


@pytest.mark.slow
def test_a_terminal_that_changes_its_size_has_one_picture_and_no_rest_of_another(tmp_path: Path) -> None:
    with terminal(tmp_path, 100, 30, PROGRAM) as tmux:
        until(lambda: fits(tmux, 100), "the picture")
        for width, height in ((60, 24), (120, 30), (70, 20), (200, 60), (60, 24), (100, 30)):
            tmux.resize(width, height)
            until(lambda width=width: fits(tmux, width), f"one picture of {width} columns")
            assert one_picture(tmux.screen(history=True)), "above the screen there is none"
        (tmp_path / "stop").touch()
        until(lambda: any("after the display" in row for row in tmux.screen()), "the end")
        rows = [row.rstrip() for row in tmux.screen(history=True) if row.strip()]
    assert rows[0] == "before the display" and rows[-1] == "after the display"
    assert rows[-2] == "a line of the log", "what was printed meanwhile"
    assert one_picture(rows)

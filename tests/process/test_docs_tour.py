"""docs/tour.md, typed from top to bottom as a new user would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_support import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tour.md"
FILES = ("make_problems.py", "my_tasks.py", "run.yaml")  # in the order of their blocks
DEADLINE_S = 1200

pytestmark = [pytest.mark.process, pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and the output of the whole page."""
    folder = tmp_path_factory.mktemp("tour")
    text = PAGE.read_text(encoding="utf-8").replace("5757", str(free_port()))
    for name, content in zip(FILES, re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, re.M | re.S), strict=True):
        (folder / name).write_text(content)
    commands = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    (folder / "tour.sh").write_text("set -euxo pipefail\n" + "\n".join(commands))
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[1])}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "tour.sh"], cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(DEADLINE_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    shown = (folder / "output").read_text(errors="replace")
    assert code == 0, shown[-5000:] + (folder / "hub.log").read_text()[-2000:]
    yield folder, shown


def test_the_run_survives_a_crash_and_an_interruption_and_reaches_its_end(toured: tuple[Path, str]) -> None:
    folder, _ = toured
    lines = [json.loads(line) for line in (folder / "runs/tour/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    hub = (folder / "hub.log").read_text()
    assert hub.count("the hub has restarted at step") == 1
    assert hub.count("has joined; actors: ") == 2, "both actors kept their places"
    assert hub.count("the learner has joined") == 2, "the second one resumed"
    summary = json.loads((folder / "runs/tour/summary.json").read_text())
    assert summary["ledger"]["trained"] == 80 * 8
    assert all(line["reward_auto"] >= line["pass_auto"] for line in lines), "the reward has two parts"
    assert any(line["reward_auto"] > line["pass_auto"] for line in lines)


def test_the_doctor_found_no_failure_and_the_page_shows_what_it_says(toured: tuple[Path, str]) -> None:
    folder, shown = toured
    assert "nothing failed" in shown
    assert "my_tasks:solved: rewards from 1 to 1 for 4 responses" in " ".join(shown.split())
    assert "learner.resume=true" in shown, "the command that goes on"
    assert (folder / "runs/tour/report.html").exists()
    assert (folder / "runs/tour/policy/model.safetensors").exists()
    assert "alone: " in shown and "with the strategy: " in shown, "samples"
    assert "runs/tour/policy, written " in shown, "chat"

"""The display of a run: it fits its terminal and shows all known values and no others."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from synthetic_metrics import synthetic_lines

from sgpo_async.config import Run
from sgpo_async.local.display import Lines, View, line
from sgpo_async.local.live import render, sparkline
from sgpo_async.local.show import Show
from sgpo_async.logs import printable


def status_at(step: int) -> dict[str, Any]:
    actor = {"state": "serving", "version": step, "running": 64, "tokens": 51_234_567, "tokens_per_s": 12_345.6}
    return {
        "step": step,
        "actors": [actor | {"name": f"actor-{number}", "idle": 0.031, "leases": 9, "lag": 1.1} for number in range(2)],
        "lag": {"mean": 1.084, "max": 3},
        "alpha": 0.4123,
        "engine_idle": 0.0431,
        "buffer": 17,
        "evaluations": [{"pass_auto": 0.055, "pass_guided": 0.94}, {"pass_auto": 0.613, "pass_guided": 0.951}],
    }


def view_at(step: int, **changes: Any) -> View:
    history = synthetic_lines(120)[:step]
    about: dict[str, Any] = {
        "name": "demo",
        "phase": "training",
        "steps": 120,
        "elapsed_s": 83.2,
        "metrics": history[-1] if history else {},
        "history": history,
        "status": status_at(step) if step else {},
        "actors": {"actor-0": "started", "actor-1.2": "restarting"},
        "notes": ["actor-1.1 was killed by signal 9, starts again in 2 s (see runs/demo/logs/actor-1.1.log)"] * 9,
    }
    return View(**(about | changes))


def score_of(name: str, avg: float | None, low: float | None, high: float | None, samples: int = 4) -> dict[str, Any]:
    return {"name": name, "avg": avg, "low": low, "high": high, "samples": samples, "problems": 30 if avg else 0}


PAPER = (
    score_of("math500", 0.613, 0.57, 0.654),
    score_of("olympiadbench", 0.231, 0.199, 0.263),
    score_of("amc23", 0.4, 0.251, 0.549, samples=32),
    score_of("aime24", 1.0, 1.0, 1.0, samples=32),
)


def benchmarked(view: View, *rounds: Sequence[dict[str, Any]]) -> View:
    """The same view with these rounds of benchmark scores."""
    done = [{"pass_auto": 0.5, "pass_guided": 0.9, "benchmarks": list(scores)} for scores in rounds]
    return replace(view, status=dict(view.status) | {"evaluations": done})


def picture(view: View, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, height=50, record=True, color_system=None, force_terminal=True, file=io.StringIO())
    console.print(render(view, width, height))
    return console.export_text().splitlines()


def alarmed(view: View, *steps: int) -> View:
    """The same view with a mismatch between engine and learner in these steps."""
    history = [line | {"mismatch_judged_later": 0.123} if line["step"] in steps else line for line in view.history]
    return replace(view, history=history)


@pytest.mark.parametrize("text", ["short", "\x1b[31mred", "[bold]x[/bold]", "a\nb", "漢字" * 99, ""])
def test_the_newest_sample_is_one_line(text: str) -> None:
    for correct, mark in ((True, "✓"), (False, "✗")):
        view = view_at(67, sample={"step": 66, "rollouts": [{"correct": correct, "text": text}]})
        (row,) = [row for row in picture(view, 80) if row.startswith("sample")]
        assert mark in row and all(c.isprintable() for c in row)
    assert not [row for row in picture(view_at(67), 80) if row.startswith("sample")]


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (140, 40)])
@pytest.mark.parametrize("step", [0, 1, 67, 120])
def test_the_picture_fits_the_terminal(width: int, height: int, step: int) -> None:
    sample = {"step": step, "rollouts": [{"correct": True, "text": "3 yarrow swap\n" * 99}]}
    rows = picture(alarmed(view_at(step, sample=sample), 1), width, height)
    assert len(rows) <= height
    assert max(map(len, rows)) <= width
    table = [row for row in rows if row.startswith(("actor  ", "actor-0", "pass rate", "mean alpha"))]
    assert len(table) == 4
    assert not any("…" in row for row in table)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_of_many_actors_those_that_do_not_serve_are_shown_and_the_others_counted(width: int) -> None:
    """Alarms and notes stay on the screen."""
    status = status_at(67)
    actors = [status["actors"][0] | {"name": f"actor-{number}"} for number in range(40)]
    actors[33] = actors[33] | {"state": "lost"}
    view = alarmed(view_at(67, status=status | {"actors": actors}, actors={}), 1)
    rows = picture(view, width, 24)
    assert len(rows) == 24 and max(map(len, rows)) <= width
    shown = [row for row in rows if row.startswith("actor-") and "notes" not in row and "killed" not in row]
    assert shown[0].startswith("actor-33 ") and "lost" in shown[0]
    assert any(row.startswith(f"{40 - len(shown)} more") for row in rows)
    assert "mismatch alarm no. 1" in " ".join(rows) and sum("was killed by signal" in row for row in rows) == 4
    assert len(picture(view, width, 24)) < len(picture(view, width)), "without a height, all are shown"


def test_a_narrow_picture_has_all_facts_and_the_columns_that_matter() -> None:
    text = "\n".join(picture(view_at(67), 60))
    for fact in ("mean alpha", "lag", "tokens/s", "trainer idle", "engine idle", "buffered", "mismatch", "canary"):
        assert fact in text
    assert "…" not in text.partition("actor-1.1")[0]
    assert "17 groups" in text and "1.08 (max 3)" in text and "10⁻⁷ nats" in text


def test_the_picture_shows_the_values_of_the_hub_and_the_learner() -> None:
    text = "\n".join(picture(view_at(67), 80))
    for expected in ("step 67/120", "1:23 elapsed", "61.3 %", "5.5 %", "95.1 %", "0.412", "1.08 (max 3)", "4.3 %"):
        assert expected in text
    for expected in ("17 groups", "51.2 M", "12.3 k", "actor-1.2 restarting"):
        assert expected in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_picture_with_the_benchmarks_of_the_paper_fits_the_terminal(width: int, height: int) -> None:
    rows = picture(benchmarked(alarmed(view_at(67), 1), PAPER), width)
    assert len(rows) < height and max(map(len, rows)) <= width
    scores = [row for row in rows if "@" in row]
    assert len(scores) == 2 and not any("…" in row for row in scores)
    for expected in ("math500@4", "61.3 % [57.0, 65.4]", "olympiadbench@4", "aime24@32", "[100.0, 100.0]"):
        assert expected in "\n".join(scores)


def test_the_newest_score_of_each_benchmark_is_shown() -> None:
    first, unserved = PAPER, [score_of("math500", None, None, None), score_of("new", None, None, None)]
    second = [score_of("math500", 0.7, 0.65, 0.75)]
    shown = "\n".join(picture(benchmarked(view_at(67), first, second, unserved), 80))
    # The last round has no score, and the earlier score stays.
    assert "70.0 % [65.0, 75.0]" in shown and "61.3 % [57" not in shown
    assert "40.0 % [25.1, 54.9]" in shown and "new@4" in shown
    without_hub = replace(view_at(67), status={}, metrics={"eval_benchmarks": {"math500": PAPER[0]}})
    assert "61.3 % [57.0, 65.4]" in "\n".join(picture(without_hub, 80))


def test_a_run_without_benchmarks_has_no_rows_for_them() -> None:
    view = view_at(67)
    assert picture(benchmarked(view, (), ()), 80) == picture(benchmarked(view, ()), 80)
    assert "@" not in "\n".join(picture(view, 80))
    # Three more rows for the benchmarks, and two notes less.
    assert len(picture(benchmarked(view, PAPER), 80)) == len(picture(view, 80)) + 1


def test_a_long_benchmark_name_is_shortened() -> None:
    scores = [score_of("a-benchmark-with-a-very-long-name-of-its-own", 0.5, 0.4, 0.6), PAPER[0]]
    rows = picture(benchmarked(view_at(67), scores), 80)
    [row] = [row for row in rows if "a-benchmark" in row]
    assert "…" in row and "50.0 % [40.0, 60.0]" in row and "61.3 % [57.0, 65.4]" in row


def test_unknown_values_are_shown_as_dashes() -> None:
    text = "\n".join(picture(view_at(0, phase="starting the hub", notes=[]), 80))
    assert "None" not in text
    assert "nan" not in text
    assert "starting the hub" in text
    assert "step 0/120" in text


def test_an_actor_that_was_started_outside_the_run_is_listed() -> None:
    view = view_at(5, actors={"actor-0": "started"})
    assert [row["name"] for row in view.rows()] == ["actor-0", "actor-1"]


def test_a_line_is_printed_for_each_new_phase_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(every_s=1e9)
    lines.show(view_at(0, phase="starting the hub", notes=[]))
    lines.show(view_at(0, phase="starting the hub", notes=["actor-0 has left"]))
    lines.show(view_at(67, notes=["actor-0 has left"]))
    lines.show(view_at(68, notes=["actor-0 has left"]))
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "[ 1:23] starting the hub; actor-0 started, actor-1.2 restarting"
    assert output[1] == "[ 1:23] actor-0 has left"
    assert output[2].startswith("[ 1:23] step 67/120  pass ")
    assert len(output) == 3


def test_an_alarm_about_the_weights_of_engines_is_shown_by_the_picture_and_in_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = view_at(67)
    status = {**view.status, "canary_max": 0.25, "canary_alarms": {"differs": 4, "stuck": 0, "moved": 0}}
    alarmed = replace(view, status=status)
    told = "weights alarm: engines serve log-probabilities that are not the learner's (4)"
    text = " ".join(" ".join(picture(alarmed, 120)).split())
    assert told in text and "canary 0.25 nats" in text
    assert "weights alarm" not in "\n".join(picture(view, 120))
    lines = Lines()
    lines.show(view)
    lines.show(alarmed)
    assert told in capsys.readouterr().out


def test_a_mismatch_alarm_is_shown_and_stays(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = view_at(41), alarmed(view_at(41), 30, 41)
    assert "9.0·10⁻⁸ nats" in "\n".join(picture(good, 140))
    assert "alarm" not in "\n".join(picture(good, 140))
    text = " ".join(picture(bad, 80))
    assert "mismatch alarm no. 2: step 41: engine and learner differ by 0.12 nats" in text
    lines = Lines(every_s=1e9)
    for view in (replace(view, notes=[]) for view in (good, alarmed(good, 30), bad, replace(bad, phase="finishing"))):
        lines.show(view)
    alarms = [line for line in capsys.readouterr().out.splitlines() if "alarm" in line]
    assert [line.partition(": engine")[0] for line in alarms] == [
        "[ 1:23] mismatch alarm no. 1: step 30",  # printed at once
        "[ 1:23] mismatch alarm no. 2: step 41",  # printed with the next line
    ]


def test_the_line_has_all_metrics() -> None:
    text = line(view_at(67))
    for expected in ("held-out 61.3 %, 95.1 %", "alpha 0.412", "lag 1.08 (max 3)", "tokens/s", "engines 4.3 %"):
        assert expected in text


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0.0, 0.5, None, 1.0], 10) == "▁▅█"
    long = sparkline([step / 999 for step in range(1000)], 16)
    assert long == "".join(sorted(long))
    assert len(long) == 16


MARKUP = ["[/x]", "[bold red]x[/]", "[link=file:///etc]x", "[[/", "\\[/x]", ":bomb:"]
HOSTILE = [*MARKUP, "\x1b[2J\x1b]0;x\x07", "a\nb\r\tc", "\u202ex"]


def hostile_view(text: str, **changes: Any) -> View:
    """A run in which everything that comes from another machine is `text`, and its own names are markup."""
    actor = {"name": text, "state": text, "version": 1, "running": 1, "tokens": 1, "tokens_per_s": 1.0, "idle": 0.1}
    score = score_of(MARKUP[0], 0.5, 0.4, 0.6)
    status = {"step": 5, "actors": [actor], "evaluations": [{"benchmarks": [score]}]}
    return view_at(5, name=MARKUP[0], status=status, notes=[printable(f"actor-0 said {text}")], **changes)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("markup", [False, True])
def test_what_comes_from_outside_is_shown_as_it_is(text: str, markup: bool) -> None:
    console = Console(width=140, record=True, markup=markup, color_system=None, file=io.StringIO())
    console.print(render(hostile_view(text), 140))
    shown = console.export_text()
    assert not set(shown) & set("\x1b\x07\r\t\u202e")
    assert shown.count(printable(text).partition("\n")[0]) >= 3, "actor, state, note"
    assert shown.count("[/x]") >= 2 and "[/x]@4" in shown, "run, benchmark"


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_cannot_be_made_by_what_comes_from_outside(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(every_s=1e9)
    lines.show(
        replace(hostile_view(text), metrics={}, status={"actors": hostile_view(text).status["actors"]}, notes=[])
    )
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and output[:-1].isprintable()
    assert printable(text).replace("\n", "\\n") in output


def test_a_long_name_does_not_widen_the_picture() -> None:
    rows = picture(hostile_view("x" * 10_000), 80)
    assert max(map(len, rows)) <= 80 and len(rows) < 24


def test_a_note_of_many_lines_takes_one_in_the_picture() -> None:
    log = "actor-0 ended with code 1: the end of actor-0.log:\n" + "    Traceback\n" * 12
    assert len(picture(view_at(5, notes=[log]), 80)) == len(picture(view_at(5, notes=["one"]), 80))


@pytest.mark.parametrize(("guided", "told"), [(0.9, False), (0.2, True)])
def test_the_closing_table_and_the_report_say_what_to_change(
    guided: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = Show(Run(name="run", out=str(tmp_path)))
    lines = [line | {"pass_auto": 0.3, "pass_guided": guided} for line in synthetic_lines(30)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    show.closing()
    output = " ".join(capsys.readouterr().out.split())
    assert ("advice Strategies do not help: pass rate 20.0 % with strategies, 30.0 % alone" in output) == told
    assert ("Strategies do not help" in (tmp_path / "run" / "report.html").read_text()) == told


@pytest.mark.parametrize("text", ["[bold]", "[[x]", ":bomb:", "[x=1]"])
def test_a_run_of_any_name_is_shown_to_its_end(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The supervisor's notes hold ends of logs; the closing table has the run's name and its folder's."""
    run = Run(name=text, out=str(tmp_path / "[/out]"))
    show = Show(run)
    slot = SimpleNamespace(name="actor-0", state="started")
    supervisor = SimpleNamespace(address="", phase="starting the hub", slots=[slot], notes=["log: [/x] \x1b[2J"])
    show.update(supervisor)  # type: ignore[arg-type]
    show.close(stopping=True)
    folder = Path(run.folder)
    (folder / "policy").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in synthetic_lines(3)))
    show.closing()
    show.stopped()
    output = capsys.readouterr().out
    assert "log: [/x] \\x1b[2J" in output
    assert f"policy: {folder}/policy" in output and output.count(text) >= 3, "title, policy, report"


def test_no_console_reads_markup() -> None:
    """Markup in a name or a log would change what is shown, or end the command by a MarkupError."""
    package = Path(__file__).resolve().parents[2] / "sgpo_async"
    calls = [call for file in package.rglob("*.py") for call in re.findall(r"\bConsole\((.*?)\)", file.read_text())]
    assert len(calls) >= 5
    assert all("markup=False, emoji=False" in call for call in calls), calls


def test_the_address_of_the_dashboard_is_shown_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:8265/"
    assert not any(url in row for row in picture(view_at(7), 80))
    assert any(row.rstrip().endswith(url) for row in picture(view_at(7, dashboard=url), 80))
    lines = Lines(every_s=1000.0)
    for dashboard in ("", url, url, "", url, "http://127.0.0.1:9/"):
        lines.show(view_at(7, dashboard=dashboard, notes=[]))
    printed = [row for row in capsys.readouterr().out.splitlines() if "dashboard" in row]
    assert [row.partition("] ")[2] for row in printed] == [f"dashboard: {url}", "dashboard: http://127.0.0.1:9/"]

"""The report page and the final metrics of runs with known metrics."""

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_metrics import synthetic_lines, write_lines

from sgpo_async.config import Run, Tasks, to_yaml
from sgpo_async.errors import DataError
from sgpo_async.report import final_rows, write_report
from sgpo_async.report.charts import CHARTS
from sgpo_async.report.closing import ledger_rows, summarise
from sgpo_async.report.lag import lag_shares
from sgpo_async.report.numbers import clock, number, percent, scientific, short
from sgpo_async.report.svg import HEIGHT, WIDTH, Frame, Series, line_chart, nice_ticks, powers_of_ten, running_mean


class Balanced(HTMLParser):
    """Collects headings, and fails if a tag is closed in the wrong order."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        del attrs
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[Any]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] == "h2":
            self.headings.append(data)


def page_of(folder: Path) -> tuple[str, list[str]]:
    text = write_report(folder).read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open_tags == []
    return text, parser.headings


def test_the_page_has_every_chart_the_final_metrics_and_the_changed_settings(tmp_path: Path) -> None:
    write_lines(tmp_path / "demo", synthetic_lines())
    (tmp_path / "demo" / "config.yaml").write_text(to_yaml(Run(name="demo", steps=120, tasks=Tasks(held_out=7))))
    text, headings = page_of(tmp_path / "demo")
    assert set(headings) == {chart.title for chart in CHARTS} | {
        *("Evaluation", "Training", "Lag and mismatch", "System"),
        "Lag",
        "Final metrics",
        "Settings that differ from the defaults",
    }
    assert "1960 dispatched = 1920 trained + 3 dropped (stale 3) + 21 in flight + 16 buffered" in text
    assert "<td>tasks.held_out</td><td>7 (default 200)</td>" in text
    assert "<td>optim.lr</td>" not in text


def test_a_mismatch_alarm_is_at_the_top_and_in_the_final_metrics(tmp_path: Path) -> None:
    lines = synthetic_lines()
    write_lines(tmp_path, lines)
    text, _ = page_of(tmp_path)
    assert "ALARM" not in text
    assert "mean at most 9.0·10⁻⁸ nats (bound 10⁻⁴), single token at most 1.5·10⁻⁵, judged in 6 steps" in text
    lines[40]["mismatch_judged_later"] = 2e-3
    write_lines(tmp_path, lines)
    text, _ = page_of(tmp_path)
    alarm = (
        "in 1 of 6 judged steps engine and learner differ by more than 10⁻⁴ nats; "
        "worst: 2.0·10⁻³, after an update in flight, in step 41"
    )
    assert f'<p class="alarm"><b>MISMATCH ALARM</b> {alarm}</p>' in text
    assert dict(final_rows(tmp_path))["MISMATCH ALARM"] == alarm


def test_warnings_are_at_the_top_with_their_commands_as_code(tmp_path: Path) -> None:
    lines = [line | {"pass_auto": 0.3, "pass_guided": 0.2, "tokens_dropped": 0.5} for line in synthetic_lines()]
    write_lines(tmp_path, lines)
    (tmp_path / "config.yaml").write_text(to_yaml(Run(steps=120, tasks=Tasks(context="response"))))
    text, _ = page_of(tmp_path)
    top = text[: text.index('<div class="tiles">')]
    assert top.count('<p class="alarm advice">') == 2
    assert "<b>Strategies do not help:</b> pass rate 20.0 % with strategies, 30.0 % alone; " in top
    assert "<code>sgpo-async samples RUN</code>" in top and "tasks.context (now response)" in top
    assert "<b>Rollouts are dropped as stale:</b>" in top


def test_benchmarks_have_a_chart_and_final_metrics(tmp_path: Path) -> None:
    lines = synthetic_lines()
    for line in lines:
        if "eval_pass_auto" in line:
            score = {"name": "aime24", "avg": 0.1 + line["step"] / 400, "low": 0.3, "high": 0.5, "samples": 32}
            line |= {"eval_benchmarks": {"aime24": score | {"problems": 30}}, "eval_lag": 0.75}
    write_lines(tmp_path, lines)
    text, headings = page_of(tmp_path)
    assert headings[:3] == ["Evaluation", "Pass rate", "Benchmarks"]
    score_text = "10.2 % → 40.0 % [30.0 %, 50.0 %], 30 problems, lag 0.750"
    assert dict(final_rows(tmp_path))["aime24, avg@32"] == score_text
    assert f"<td>aime24, avg@32</td><td>{score_text}</td>" in text


def test_alarms_about_the_weights_that_engines_serve_are_at_the_top_and_in_the_final_metrics(tmp_path: Path) -> None:
    lines = synthetic_lines()
    write_lines(tmp_path, lines)
    text, _ = page_of(tmp_path)
    assert "WEIGHTS ALARM" not in text and "<td>canary</td>" in text
    for line in lines[50:]:
        line["canary_alarms"] = {"differs": 3, "stuck": 2, "moved": 0}
    write_lines(tmp_path, lines)
    text, _ = page_of(tmp_path)
    told = "log-probabilities that are not the learner&#x27;s (3), weights that do not move with the versions (2)"
    assert text.count(told) == 2, "at the top and among the final metrics"
    assert "without a version" not in text


def test_the_page_of_an_old_run_does_not_mention_mismatch(tmp_path: Path) -> None:
    old = [{key: value for key, value in line.items() if "mismatch" not in key} for line in synthetic_lines()]
    write_lines(tmp_path, old)
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 120, "wall_s": 65}))
    text, headings = page_of(tmp_path)
    assert "Engine against learner" not in headings
    assert "mismatch" not in text.replace("Lag and mismatch", "").lower()


def test_the_page_says_if_the_mismatch_could_not_be_judged(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"step": 1, "mismatch_mean_stale_first": 0.02, "mismatch_bound": None}])
    text, headings = page_of(tmp_path)
    assert "Engine against learner" in headings
    assert "not judged: too few tokens had lag 0" in text


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    write_lines(tmp_path, synthetic_lines())
    text, _ = page_of(tmp_path)
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", text)


def test_the_page_of_one_step_with_one_metric_has_one_chart(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"step": 1, "loss": 0.5, "pass_auto": None}])
    text, headings = page_of(tmp_path)
    assert headings == ["Training", "Losses", "Final metrics"]
    assert text.count('<circle class="dot') == 1


def test_the_name_of_a_run_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>&run"
    write_lines(folder, [{"step": 1, "loss": 0.5}])
    text, _ = page_of(folder)
    assert "<b>&run" not in text
    assert "<h1>&lt;b&gt;&amp;run</h1>" in text


def test_a_folder_without_a_finished_step_raises_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"contains no metrics\.jsonl with a finished step; give the folder of a run, e\.g\. runs/demo$"
    ):
        write_report(tmp_path)


def test_the_module_is_a_command_that_returns_an_exit_code(tmp_path: Path) -> None:
    write_lines(tmp_path, [{"step": 1, "loss": 0.5}])
    command = [sys.executable, "-m", "sgpo_async.report"]
    good = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert (good.returncode, good.stdout) == (0, f"{tmp_path / 'report.html'}\n")
    bad = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, timeout=240, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def test_summarise_computes_the_summary_from_the_metrics() -> None:
    lines = [
        {"step": 1, "wall_s": 2.0, "lag_mean": 0.0, "lag_max": 0, "eval_pass_auto": 0.1, "learner_idle": 0.5},
        {"step": 2, "wall_s": 4.0, "lag_mean": 1.0, "lag_max": 3, "tokens_generated": 800, "learner_idle": None},
        {"step": 3, "wall_s": 8.0, "lag_mean": 2.0, "lag_max": 2, "tokens_generated": 1600, "eval_pass_auto": 0.8},
    ]
    summary = summarise(lines)
    assert (summary["pass_auto_first"], summary["pass_auto_last"]) == (0.1, 0.8)
    assert (summary["lag_mean"], summary["lag_max"], summary["learner_idle"]) == (1.0, 3, 0.5)
    assert (summary["steps"], summary["wall_s"], summary["tokens_generated"]) == (3, 8.0, 1600)


def test_the_final_metrics_come_from_the_summary_file_if_it_exists(tmp_path: Path) -> None:
    write_lines(tmp_path, synthetic_lines(3))
    (tmp_path / "summary.json").write_text(
        json.dumps({"steps": 3, "wall_s": 65, "pass_auto_first": 0.05, "pass_auto_last": 0.9, "tokens_generated": 6500})
    )
    rows = dict(final_rows(tmp_path))
    assert rows["held-out pass rate, alone"] == "5.0 % → 90.0 %"
    assert rows["tokens generated"] == "6500 (100 a second)"
    assert rows["wall time"] == "1:05"


def test_a_ledger_that_does_not_balance_is_marked() -> None:
    good = {"dispatched": 10, "trained": 5, "dropped": {"stale": 2}, "in_flight": 2, "buffered": 1}
    assert ledger_rows(good) == [
        ("ledger of tasks", "10 dispatched = 5 trained + 2 dropped (stale 2) + 2 in flight + 1 buffered")
    ]
    assert ledger_rows(good | {"trained": 6})[0][1].endswith("NOT BALANCED")
    assert ledger_rows({}) == []


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_evenly_spaced_and_enclose_the_data(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] >= low + span * (1 - 1e-6)
    gaps = [after - before for before, after in itertools.pairwise(ticks)]
    assert max(gaps) - min(gaps) <= 1e-6 * max(gaps) + 1e-9
    assert 2 <= len(ticks) <= 8


@given(st.lists(st.floats(0, 1e12) | st.floats(0, 1e-3), min_size=1))
def test_powers_of_ten_enclose_the_values_above_0(values: list[float]) -> None:
    ticks = powers_of_ten(values)
    above = [value for value in values if value > 1e-16]
    assert 2 <= len(ticks) <= 7
    assert all(ticks[0] <= value * (1 + 1e-6) and value <= ticks[-1] * (1 + 1e-6) for value in above)
    gaps = [math.log10(after / before) for before, after in itertools.pairwise(ticks)]
    assert max(gaps) - min(gaps) < 1e-6


def test_a_logarithmic_axis_spaces_powers_of_ten_evenly() -> None:
    frame = Frame(0, 10, 1e-8, 1.0, log=True)
    assert frame.y(1e-4) == pytest.approx((frame.y(1e-8) + frame.y(1.0)) / 2)
    assert frame.y(0.0) == frame.y(1e-8)  # 0 is drawn at the lower end


@pytest.mark.parametrize("log", [False, True])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=50))
def test_all_points_of_a_curve_are_inside_the_drawing(log: bool, points: list[tuple[int, float]]) -> None:
    svg = line_chart([Series(name="x", points=sorted(points), colour=1, smooth=True)], y_label="y", log=log)
    assert "nan" not in svg
    for path in re.findall(r' d="M([^"]*)"', svg):
        for pair in path.split("L"):
            x, y = map(float, pair.split())
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_a_constant_curve_is_drawn_and_y_points_upwards() -> None:
    assert "<path" in line_chart([Series(name="x", points=[(1, 0.0), (2, 0.0)], colour=1)], y_label="y")
    frame = Frame(0, 10, 0, 1)
    assert frame.x(0) < frame.x(10)
    assert frame.y(0) > frame.y(1)


def test_the_running_mean_of_a_constant_is_the_constant() -> None:
    points = [(float(x), 3.0) for x in range(20)]
    assert running_mean(points, 5) == points


def test_lag_shares_add_up_to_1_and_merge_the_largest_lags() -> None:
    lines = [
        {"step": 1, "lag_histogram": {"0": 3, "1": 1}},
        {"step": 2},
        {"step": 3, "lag_histogram": {"7": 2, "5": 2}},
    ]
    assert lag_shares(lines) == [(1.0, [0.75, 0.25, 0, 0, 0, 0]), (3.0, [0, 0, 0, 0, 0, 1.0])]
    many = [{"step": step, "lag_histogram": {"0": 1}} for step in range(1000)]
    assert len(lag_shares(many)) <= 120


def test_numbers_percentages_and_times_are_formatted_shortly() -> None:
    values = (0, 37, 12_345, 1_234_567, 0.4123, 0.01234, 12.345, 3.0, None, float("nan"))
    expected = ["0", "37", "12.3 k", "1.23 M", "0.412", "0.0123", "12.3", "3.00", "–", "–"]
    assert [number(value) for value in values] == expected
    assert [short(value) for value in (0.0, 0.2, -0.05, 1.0025, 2500.0, 25_000.0)] == [
        *("0", "0.2", "-0.05", "1.0025", "2500", "25.0 k")
    ]
    small = (0.0, 1e-4, 3.21e-6, -2e-9, 0.01, 0.0523, 123.0, None, float("nan"))
    assert [scientific(value) for value in small] == [
        "0", "10⁻⁴", "3.2·10⁻⁶", "-2.0·10⁻⁹", "0.01", "0.052", "120", "–", "–",
    ]  # fmt: skip
    assert [percent(value) for value in (0.1234, 1, None)] == ["12.3 %", "100.0 %", "–"]
    assert [clock(value) for value in (65, 7384, None)] == ["1:05", "2:03:04", "–"]

"""Fewer lines of metrics, for the charts of a long run."""

from synthetic_metrics import synthetic_lines

from sgpo_async.report.charts import figures, other_figures
from sgpo_async.report.thin import thinned


def test_few_lines_stay_as_they_are() -> None:
    lines = synthetic_lines(50)
    assert thinned(lines, 50) == lines
    assert thinned([], 50) == []


def test_neighbouring_lines_become_their_mean() -> None:
    lines = [
        {"step": 1, "a": 1.0, "n": None, "lag_histogram": {"0": 3}, "by": {"x": 1.0}},
        {"step": 2, "a": 2.0, "n": 5.0, "lag_histogram": {"0": 1, "2": 4}, "by": {"x": 3.0, "y": 7.0}},
        {"step": 3, "a": None, "n": None, "late": 9.0},
        {"step": 4, "a": 4.0},
    ]
    assert thinned(lines, 2) == [
        {"step": 2, "a": 1.5, "n": 5.0, "lag_histogram": {"0": 4, "2": 4}, "by": {"x": 2.0, "y": 7.0}},
        {"step": 4, "a": 4.0, "n": None, "late": 9.0},
    ]


def test_a_long_run_keeps_its_charts_and_stays_small() -> None:
    lines = synthetic_lines(5000)
    short = thinned(lines, 240)
    assert len(short) <= 240 and short[-1]["step"] == 5000
    own, all_lines = figures(short), figures(lines)
    assert [html.partition("</h2>")[0] for _, html in own] == [html.partition("</h2>")[0] for _, html in all_lines]
    assert sum(len(html) for _, html in own) < 1_000_000


def test_every_number_without_a_chart_gets_one() -> None:
    titles = [html.partition("<h2>")[2].partition("</h2>")[0] for _, html in other_figures(synthetic_lines(20))]
    assert {"lr", "lag_mean", "actors", "mismatch_max_lag0_first"} <= set(titles)
    assert not {"step", "loss", "ledger", "lag_histogram", "engine_idle"} & set(titles)

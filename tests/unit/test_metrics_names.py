"""The table of metrics: it is the source of names, sections and docs/metrics.md, and has exactly what is written."""

import json
from pathlib import Path

import pytest
from synthetic_metrics import synthetic_lines

from sgpo_async.metrics.names import METRICS, REST, SECTIONS, STEPS, histograms, name_of, scalars, section_of
from sgpo_async.metrics.page import page

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "docs/results").rglob("steps.jsonl"))


def test_the_page_is_current() -> None:
    command = "python -m sgpo_async.metrics.page > docs/metrics.md"
    assert (ROOT / "docs/metrics.md").read_text() == page(), f"run: {command}"
    assert command in page()


def test_names_differ_and_none_is_the_folder_of_another() -> None:
    """MLflow's folders and TensorBoard's sections follow the slashes."""
    names = [metric.name for metric in METRICS.values()]
    assert len(set(names)) == len(names) == len({*METRICS})
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]
    assert {name.split("/")[0] for name in names} == set(SECTIONS)


def test_every_meaning_is_one_sentence_and_every_metric_has_a_unit() -> None:
    for metric in METRICS.values():
        assert metric.meaning[0].isupper() and metric.meaning.endswith(".") and metric.unit, metric
        assert len(metric.meaning) < 160 and "\n" not in metric.meaning, metric


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_the_keys_of_committed_runs_are_in_the_table(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines and {key for line in lines for key in line} <= METRICS.keys()


def test_there_are_committed_runs() -> None:
    assert COMMITTED


def test_the_lines_of_the_tests_have_no_other_keys() -> None:
    assert {key for line in synthetic_lines() for key in line} <= {metric.key for metric in STEPS}


def test_the_numbers_of_a_line_get_names_in_sections() -> None:
    line = {
        "step": 7,
        "loss": 0.5,
        "entropy": None,
        "eval_pass_auto": 0.25,
        "eval_served": [3, 4],
        "eval_benchmarks": {"math": {"name": "math", "avg": 0.5, "pass_at": {"2": 0.6}}},
        "mismatch_mean_lag0_first": 1e-7,
        "lag_histogram": {"10": 3, "2": 1},
        "ledger": {"trained": 9, "dropped": {"stale": 1}},
        "of_tomorrow": 1,
    }
    assert scalars(line) == {
        "train/loss": 0.5,
        "eval/pass_auto": 0.25,
        "eval/benchmarks/math/avg": 0.5,
        "eval/benchmarks/math/pass_at/2": 0.6,
        "mismatch/mean_lag0_first": 1e-7,
        "system/ledger/trained": 9,
        "system/ledger/dropped/stale": 1,
        "other/of_tomorrow": 1,
    }
    assert histograms(line) == {"mismatch/lag_histogram": {2: 1.0, 10: 3.0}}
    assert histograms({"lag_histogram": {}}) == {}
    assert section_of("ledger/dropped") == "system" and section_of("of_tomorrow") == REST
    assert name_of("validation_loss") == "eval/validation_loss"

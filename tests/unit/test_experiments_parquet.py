"""Results in one Parquet file: reading returns what was written, the metrics of curves with seven digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from experiment_support import SMALL, result, write
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.config.experiment import load_experiment
from sgpo_async.experiments.identity import filled
from sgpo_async.experiments.parquet import _common, _same, _without, read_trials, write_trials
from sgpo_async.experiments.plan import Result, cells, final, tuning
from sgpo_async.files import to_json

BASES: dict[str, Any] = {"warm": {"start": "builtin:cues", "train": {"algorithm.objective": "sft", "steps": 3}}}
VALUES = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 1.0, 0.5]), st.text(max_size=2))
CONFIGS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.one_of(VALUES, inner), max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(CONFIGS, min_size=1, max_size=4))
def test_the_common_part_and_the_differences_restore_every_configuration(configs: list[dict[str, Any]]) -> None:
    common = configs[0]
    for config in configs:
        common = _common(common, config)
    for config in configs:
        assert _same(filled(_without(config, common), common), config)


def results_of(folder: Path) -> tuple[Any, dict[str, Result]]:
    """A small experiment and its results; every second trial diverged, every third has no guided pass rate."""
    settings = {"calm": {}, "stale": {"hub.max_lag": 4, "model.path": "base:warm"}}
    experiment = load_experiment(write(folder, SMALL | {"settings": settings, "bases": BASES}))
    trials = tuning(experiment, {}) + final(experiment, dict.fromkeys(cells(experiment), 2e-4))
    results: dict[str, Result] = {}
    for number, trial in enumerate(trials):
        metrics = {"entropy": 0.1 + number} if number % 2 else {"alpha": 1 / 3}
        found = result(0.1, 0.2, diverged=3 if number % 2 else None, **metrics)
        if number % 3 == 0:
            found["test"]["guided"] = None
            found["curve"] = [point | {"guided": None} for point in found["curve"]]
        found["commit"] = "ab" * 20 if number % 4 else None
        results[trial.id] = found | {"config": trial.config, "rate": trial.rate, "wall_s": 1.5}
    return experiment, results


def rounded(result: Result) -> Result:
    """With the metrics of the curve as float32."""
    exact = ("step", "rollouts", "auto", "guided")
    curve = [
        {key: value if key in exact else float(np.float32(value)) for key, value in point.items()}
        for point in result["curve"]
    ]
    return result | {"curve": curve}


def test_reading_returns_every_written_result(tmp_path: Path) -> None:
    experiment, results = results_of(tmp_path)
    write_trials(tmp_path / "trials.parquet", results, [experiment])
    again = read_trials(tmp_path / "trials.parquet")
    assert again.keys() == results.keys()
    for name, found in results.items():
        assert _same(again[name], rounded(found))
    write_trials(tmp_path / "again.parquet", again, [experiment])
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "trials.parquet").read_bytes()


def test_a_row_describes_its_trial(tmp_path: Path) -> None:
    experiment, results = results_of(tmp_path)
    write_trials(tmp_path / "trials.parquet", results, [experiment])
    table = pq.read_table(tmp_path / "trials.parquet")
    rows = {row["id"]: row for row in table.to_pylist()}
    trial = tuning(experiment, {})[-1]
    row = rows[trial.id]
    assert row["cells"] == [{"experiment": "small", "setting": "stale", "method": "GRPO", "use": "tuning"}]
    assert (row["base"], row["lag"], row["seed"], row["learning_rate"]) == ("warm", 4, 8, 1e-3)
    assert {row["base"] for row in rows.values()} == {"warm", "builtin:cues"}
    calm = rows[tuning(experiment, {})[0].id]
    assert "row_tokens" not in calm["config"] and b"row_tokens" in table.schema.metadata[b"common_configuration"]


def test_a_base_is_named_where_a_result_was_stored_before_its_recipe_had_all_keys(tmp_path: Path) -> None:
    experiment, results = results_of(tmp_path)
    stored = {id: json.loads(to_json(found)) for id, found in results.items()}  # infinity is null there
    for found in stored.values():
        if isinstance(origin := found["config"]["model"]["path"], dict):
            assert origin["trained"]["algorithm"].pop("kl_clip") is None
    write_trials(tmp_path / "trials.parquet", stored, [experiment])
    assert {*pq.read_table(tmp_path / "trials.parquet")["base"].to_pylist()} == {"warm", "builtin:cues"}


def test_a_trial_that_belongs_to_no_experiment_is_kept(tmp_path: Path) -> None:
    _, results = results_of(tmp_path)
    write_trials(tmp_path / "trials.parquet", results, [])
    assert read_trials(tmp_path / "trials.parquet").keys() == results.keys()
    assert pq.read_table(tmp_path / "trials.parquet")["cells"].to_pylist() == [[]] * len(results)

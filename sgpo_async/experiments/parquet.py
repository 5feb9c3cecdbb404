"""All results as one Parquet file with a row for each trial. Keys with the same value in all trials are stored once.

    results/ID.json, ... ─▶ write_trials ─▶ trials.parquet ─▶ read_trials ─▶ the same results

The metrics of a curve are float32 (seven digits), which makes the file a third smaller. The validation pass rates
`auto` and `guided`, and all numbers outside curves, are exact.

Columns: `id`; `cells`, the table cells in which the trial counts; `base`, the model that it starts from; `seed`; `lag`;
`learning_rate`; `config`, as JSON: the keys whose values differ between trials; and all other keys of a result, such as
`commit`, `test` and `curve`. The file's metadata holds the common keys with their values, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sgpo_async.config.experiment import Experiment
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.identity import Plain, decisive_origin, filled, identity, recipe
from sgpo_async.experiments.plan import Result, best_rates, final, tuning
from sgpo_async.files import write_whole

COMMON = b"common_configuration"  # key of the file's metadata
LEVEL = 11  # of Brotli: slow to write, but as fast to read as lower levels
FOR_READERS = ("id", "cells", "base", "seed", "lag", "learning_rate")  # columns that can be derived
# Keys that every point of a curve has, even if the value is None; their values are exact.
EXACT = {"step": pa.int64(), "rollouts": pa.int64(), "auto": pa.float64(), "guided": pa.float64()}


def write_trials(path: Path, results: Mapping[str, Result], experiments: Sequence[Experiment]) -> None:
    """Write all `results`, first those of `experiments` in order. The file is written completely or not at all.

    Args:
        experiments: source of the names in the columns `cells` and `base`, which `read_trials` does not need.
    """
    cells = _cells(experiments, results)
    names = {_origin(recipe(experiment, name)): name for experiment in experiments for name in experiment.bases}
    common = reduce(_common, (result["config"] for result in results.values()))
    in_order = [id for id in cells if id in results] + sorted(results.keys() - cells.keys())
    rows = [
        {"id": id, "cells": cells.get(id, []), "base": _base(results[id]["config"], names)} | _row(results[id], common)
        for id in in_order
    ]
    columns: dict[str, Any] = {
        key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    columns["curve"] = _curves([row["curve"] for row in rows])
    table = pa.table(columns).replace_schema_metadata({COMMON: _sorted(common)})
    sink = pa.BufferOutputStream()
    # Nearly all numbers differ, so dictionaries of them would only make the file larger. Their first bytes are alike.
    fields = table.schema.field("curve").type.value_type.fields
    split = {f"curve.list.element.{one.name}": "BYTE_STREAM_SPLIT" for one in fields if one.type == pa.float32()}
    pq.write_table(
        table, sink, compression="brotli", compression_level=LEVEL, use_dictionary=False, column_encoding=split
    )
    write_whole(path, sink.getvalue().to_pybytes())


def read_trials(path: Path) -> dict[str, Result]:
    """Identity -> result, for all trials in the file. Raises SgpoError, one line."""
    try:
        table = pq.read_table(path)
        common = json.loads((table.schema.metadata or {})[COMMON])
        results = [_result(row, common) for row in table.to_pylist()]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SgpoError(
            f"{path}: cannot be read as a table of trials ({type(error).__name__}: {reason}); name a file that "
            "`sgpo-async experiment --collect` wrote"
        ) from None
    return {identity(result["config"]): result for result in results}


def _curves(curves: Sequence[Sequence[Plain]]) -> pa.Array:
    """The curves as a column; a key that a point does not have is null."""
    keys = dict.fromkeys([*EXACT, *(key for curve in curves for point in curve for key in point)])
    point = pa.struct([(key, EXACT.get(key, pa.float32())) for key in keys])
    return pa.array(curves, type=pa.list_(point))


def _cells(experiments: Sequence[Experiment], results: Mapping[str, Result]) -> dict[str, list[dict[str, str]]]:
    """Identity -> the table cells in which that trial counts; there may be several."""
    cells: dict[str, list[dict[str, str]]] = {}
    for experiment in experiments:
        uses = {"tuning": tuning(experiment, results), "final": final(experiment, best_rates(experiment, results))}
        for use, trials in uses.items():
            for trial in trials:
                cell = {"experiment": experiment.name, "setting": trial.setting, "method": trial.method, "use": use}
                cells.setdefault(trial.id, []).append(cell)
    return cells


def _base(config: Plain, names: Mapping[str, str]) -> str:
    """The path of the model that the trial starts from, or the name of the base with this recipe."""
    path = config["model"]["path"]
    return path if isinstance(path, str) else names.get(_origin(path), "")


def _origin(recipe: Plain) -> str:
    """What is equal of two recipes that make the same base; each may be new or from a result."""
    return _sorted(decisive_origin(recipe))


def _row(result: Result, common: Plain) -> dict[str, Any]:
    config = result["config"]
    columns = {
        "seed": config["seed"],
        "lag": config["hub"]["max_lag"],
        "learning_rate": result["rate"],
        "config": _sorted(_without(config, common)),
    }
    return columns | {key: value for key, value in result.items() if key not in ("config", "rate")}


def _result(row: dict[str, Any], common: Plain) -> Result:
    """The inverse of `_row`. In Parquet all points have the same keys; a key that a point did not have is null."""
    restored = {
        "config": filled(json.loads(row["config"]), common),
        "rate": row["learning_rate"],
        "curve": [
            {key: value for key, value in point.items() if value is not None or key in EXACT} for point in row["curve"]
        ],
    }
    return {key: value for key, value in row.items() if key not in FOR_READERS} | restored


def _common(one: Plain, other: Plain) -> Plain:
    """The keys and values that two configurations share, also inside sections."""
    common: Plain = {}
    for key in (key for key in one if key in other):
        if _same(one[key], other[key]):
            common[key] = one[key]
        elif isinstance(one[key], dict) and isinstance(other[key], dict):
            common[key] = _common(one[key], other[key])
    return common


def _without(config: Plain, common: Plain) -> Plain:
    """The keys and values of `config` that are not in `common`; `filled` restores the whole."""
    return {
        key: _without(value, common[key]) if isinstance(value, dict) and key in common else value
        for key, value in config.items()
        if key not in common or not _same(value, common[key])
    }


def _same(one: object, other: object) -> bool:
    """Equal as JSON: unlike in Python, 1, 1.0 and true differ."""
    return _sorted(one) == _sorted(other)


def _sorted(value: object) -> str:
    """JSON with sorted keys, so that the same trials give the same file."""
    return json.dumps(value, sort_keys=True)

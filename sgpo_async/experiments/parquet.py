"""All results as one Parquet file, a row for each trial. What their configurations have in common is stored once.

    results/ID.json, ... ─▶ write_trials ─▶ trials.parquet ─▶ read_trials ─▶ the same results, whole

Columns: `id`; `cells`, the places of the trial in experiments' tables; `base`, the model that it begins with; `seed`;
`lag`; `learning_rate`; `config`, as JSON: the keys whose values are not the same in all trials; and all else that a
result has, such as `commit`, `test` and `curve`. The file's metadata has the common keys and their values, as JSON.
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
from sgpo_async.experiments.identity import Plain, filled, identity, recipe
from sgpo_async.experiments.plan import Result, best_rates, final, tuning
from sgpo_async.files import write_whole

COMMON = b"common_configuration"  # key of the file's metadata
LEVEL = 19  # of zstd: slow to write, and as fast to read as any other
FOR_READERS = ("id", "cells", "base", "seed", "lag", "learning_rate")  # columns that follow from the others
ALWAYS = ("step", "rollouts", "auto", "guided")  # keys that every point of a curve has, even where nothing was measured


def write_trials(path: Path, results: Mapping[str, Result], experiments: Sequence[Experiment]) -> None:
    """Write all `results`, those of `experiments` first and in their order; the file is there whole or not at all.

    Args:
        experiments: they give the names in the columns `cells` and `base`, which `read_trials` does not need.
    """
    cells = _cells(experiments, results)
    names = {_sorted(recipe(one, name)): name for one in experiments for name in one.bases}
    common = reduce(_common, (result["config"] for result in results.values()))
    in_order = [one for one in cells if one in results] + sorted(results.keys() - cells.keys())
    rows = [
        {"id": one, "cells": cells.get(one, []), "base": _base(results[one]["config"], names)}
        | _row(results[one], common)
        for one in in_order
    ]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    table = pa.table(columns).replace_schema_metadata({COMMON: _sorted(common)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=LEVEL)
    write_whole(path, sink.getvalue().to_pybytes())


def read_trials(path: Path) -> dict[str, Result]:
    """Identity -> result, of all trials in the file. Raises SgpoError, one line."""
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


def _cells(experiments: Sequence[Experiment], results: Mapping[str, Result]) -> dict[str, list[dict[str, str]]]:
    """Identity -> the places of that trial in the tables: one trial may count in several."""
    places: dict[str, list[dict[str, str]]] = {}
    for experiment in experiments:
        uses = {"tuning": tuning(experiment), "final": final(experiment, best_rates(experiment, results))}
        for use, trials in uses.items():
            for trial in trials:
                place = {"experiment": experiment.name, "setting": trial.setting, "method": trial.method, "use": use}
                places.setdefault(trial.id, []).append(place)
    return places


def _base(config: Plain, names: Mapping[str, str]) -> str:
    """The path of the model that the trial begins with, or the name of the base that is made by this recipe."""
    path = config["model"]["path"]
    return path if isinstance(path, str) else names.get(_sorted(path), "")


def _row(result: Result, common: Plain) -> dict[str, Any]:
    config = result["config"]
    about = {
        "seed": config["seed"],
        "lag": config["hub"]["max_lag"],
        "learning_rate": result["rate"],
        "config": _sorted(_without(config, common)),
    }
    return about | {key: value for key, value in result.items() if key not in ("config", "rate")}


def _result(row: dict[str, Any], common: Plain) -> Result:
    """The inverse of `_row`. In Parquet all points have the same keys: those that a point did not have are null."""
    about = {
        "config": filled(json.loads(row["config"]), common),
        "rate": row["learning_rate"],
        "curve": [
            {key: value for key, value in point.items() if value is not None or key in ALWAYS} for point in row["curve"]
        ],
    }
    return {key: value for key, value in row.items() if key not in FOR_READERS} | about


def _common(one: Plain, other: Plain) -> Plain:
    """What two configurations have in common, section by section."""
    common: Plain = {}
    for key in (key for key in one if key in other):
        if _same(one[key], other[key]):
            common[key] = one[key]
        elif isinstance(one[key], dict) and isinstance(other[key], dict):
            common[key] = _common(one[key], other[key])
    return common


def _without(config: Plain, common: Plain) -> Plain:
    """What `config` has besides `common`, so that `filled` gives the whole of it again."""
    return {
        key: _without(value, common[key]) if isinstance(value, dict) and key in common else value
        for key, value in config.items()
        if key not in common or not _same(value, common[key])
    }


def _same(one: object, other: object) -> bool:
    """Equal as JSON: unlike in Python, 1, 1.0 and true differ."""
    return _sorted(one) == _sorted(other)


def _sorted(value: object) -> str:
    """As JSON with sorted keys, so that the same trials give the same file."""
    return json.dumps(value, sort_keys=True)

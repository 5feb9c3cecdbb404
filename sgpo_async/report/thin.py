"""Fewer lines of metrics for the charts of a long run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def thinned(lines: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` lines: each stands for neighbouring ones, with the mean of every number that they have.

    Their steps are the last of each, and histograms are added up.
    """
    size = max(1, math.ceil(len(lines) / most))
    return [_merged(lines[start : start + size]) for start in range(0, len(lines), size)]


def _merged(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for line in lines for key in line)
    values = {key: [line[key] for line in lines if key in line] for key in keys}
    merged = {key: _mean(found, total=key.endswith("_histogram")) for key, found in values.items()}
    return merged | {"step": lines[-1]["step"]}


def _mean(values: Sequence[Any], *, total: bool) -> Any:
    known = [value for value in values if value is not None]
    if len(known) > 1 and all(isinstance(value, Mapping) for value in known):
        keys = dict.fromkeys(key for value in known for key in value)
        return {key: _mean([value[key] for value in known if key in value], total=total) for key in keys}
    if len(known) > 1 and all(isinstance(value, int | float) for value in known):
        return sum(known) if total else sum(known) / len(known)
    return known[-1] if known else None

"""One configuration for a run: the learner trains with the settings of the hub.

    learner's file and arguments ──┐
                                   ├─▶ agreed ─▶ the learner's configuration, or a ConfigError of one line
    settings of the hub ───────────┘

The hub decides every key except PRIVATE ones. What the learner's file and arguments leave out is taken from the hub,
and what they set must be the same there, except for PLACES.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from sgpo_async.config.load import by_key_path, from_plain, to_plain
from sgpo_async.config.schema import Run
from sgpo_async.errors import ConfigError

# Keys that concern one process only: connections, and how the learner computes and saves.
PRIVATE = ("out", "hub.address", "hub.keys", "hub.journal", "hub.dashboard", "learner", "sft", "local")
# Keys of these sections that the hub or the actors use.
SHARED = ("learner.problems_per_step", "learner.parts", "learner.batch_timeout_s", "learner.lora")
PLACES = ("model.path", "tasks.path", "engine.sglang.python", "engine.sglang.folder")  # may differ between machines


def agreed(run: Run, given: Collection[str], hub: Mapping[str, Any]) -> Run:
    """The configuration of a learner whose hub has the settings `hub`, as `to_plain` returns them.

    Args:
        run: the configuration by the learner's own file and arguments.
        given: the keys that these set (`load.given_keys`).

    Raises ConfigError that names every given key with another value than the hub's.
    """
    own, hubs = dict(by_key_path(to_plain(run))), dict(by_key_path(hub))
    differing = [key for key in sorted(given) if not _is_private(key) and own.get(key) != hubs.get(key)]
    if differing:
        as_there = "as in the hub's configuration, got"
        rules = [f"{key} must be {hubs.get(key)!r} {as_there} {own.get(key)!r}" for key in differing]
        raise ConfigError("; ".join([*rules, "start learner and hub with the same configuration"]))
    merged, plain = copy.deepcopy(dict(hub)), to_plain(run)
    for paths, source in ((PRIVATE, plain), (SHARED, hub), ([path for path in PLACES if path in given], plain)):
        for path in paths:
            _copy(path, source, merged)
    return from_plain(merged)


def _is_private(key: str) -> bool:
    return _within(key, (*PRIVATE, *PLACES)) and not _within(key, SHARED)


def _within(key: str, paths: Collection[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _copy(path: str, source: Mapping[str, Any], target: dict[str, Any]) -> None:
    """Set the key or section at `path` to its value in `source`."""
    section, _, rest = path.partition(".")
    if rest:
        _copy(rest, source[section], target[section])
    else:
        target[section] = copy.copy(source[section])

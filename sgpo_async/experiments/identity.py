"""What a trial is: its whole configuration as plain data, and a digest of what in it decides what is learned.

    words ─▶ Run ─▶ plain data; for `base:NAME` the recipe of that base ─▶ fill, leave out ─▶ digest
                                        │                                      ▲
                                        └── recorded in the result's file ─────┘  read again, years later

The overrides of a trial are not enough to identify it: the rest comes from defaults, which change, and the name of a
base does not say how the base was made. So a result keeps all values and is compared by them. Keys that a result lacks
are filled in from the present defaults: a key that a later feature brought, off by default, leaves old results valid. A
default that changed makes the results stale that were made with the old one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from typing import Any

from sgpo_async.config import load, to_plain
from sgpo_async.config.experiment import BASE, Base, Experiment
from sgpo_async.config.schema import Run
from sgpo_async.files import to_json

Plain = dict[str, Any]
"""A configuration, or a part of one, as it stands in a file."""

# A trial is one process: it has no folder of its own, no hub to send messages to, and starts neither actors nor ranks.
# These keys are read by what it leaves out (or only by validation), and a result is the same with any value of them.
NOT_LEARNED = ("name", "out", "local", "hub.max_message_mb", "learner.resume")


def configuration(experiment: Experiment, run: Run) -> Plain:
    """Every key of a trial's configuration; in place of a base's name stands its recipe."""
    plain = to_plain(run)
    path = plain["model"]["path"]
    plain["model"]["path"] = recipe(experiment, path.removeprefix(BASE)) if path.startswith(BASE) else path
    return plain


def recipe(experiment: Experiment, name: str) -> Plain:
    """How the base of this name is made, with the recipes of the bases that it starts from."""
    base = experiment.bases[name]
    if base.train:
        overrides = experiment.overrides(base.train, {"model.path": base.start})
        return {"trained": configuration(experiment, experiment.run(overrides))}
    start = recipe(experiment, base.start.removeprefix(BASE)) if base.start.startswith(BASE) else base.start
    return {"pretrained": _pretraining(base) | {"start": start}}


def identity(config: Plain) -> str:
    """Name of what is learned with this configuration, whether it was made just now or read from a result."""
    content = json.dumps(_decisive(config), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def same_recipe(one: object, other: object) -> bool:
    """Whether two recipes, each made just now or read from a file, make the same base."""
    return _decisive_model(one) == _decisive_model(other)


def _decisive(config: Plain) -> Plain:
    """The whole configuration without the keys that decide nothing."""
    # As JSON holds it, where infinity is null: what is made just now must equal what was read.
    whole: Plain = json.loads(to_json(filled(config, _defaults())))
    for key in NOT_LEARNED:
        section, _, last = key.rpartition(".")
        (whole[section] if section else whole).pop(last, None)
    whole["model"]["path"] = _decisive_model(whole["model"]["path"])
    return whole


def _decisive_model(origin: object) -> object:
    """A model's path as it is; a recipe with what it lacks, and without what decides nothing."""
    match origin:
        case {"trained": dict(config)}:
            return {"trained": _decisive(config)}
        case {"pretrained": dict(made)}:
            whole = filled(made, _pretraining(Base()))
            return {"pretrained": whole | {"start": _decisive_model(whole.get("start"))}}
    return origin


def filled(stored: Plain, defaults: Plain) -> Plain:
    """`stored` with the defaults of the keys that it lacks, section by section."""
    return defaults | {
        key: filled(value, defaults[key]) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in stored.items()
    }


def _pretraining(base: Base) -> Plain:
    return {key: value for key, value in asdict(base).items() if key not in ("start", "train")}


@cache
def _defaults() -> Plain:
    return to_plain(load(""))

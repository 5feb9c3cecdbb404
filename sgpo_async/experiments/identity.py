"""The identity of a trial: a digest of the keys of its configuration that affect what it learns.

    overrides ─▶ Run ─▶ plain data; for `base:NAME` the recipe of that base ─▶ fill, leave out ─▶ digest
                                            │                                      ▲
                                            └── recorded in the result's file ─────┘  read by later calls

The overrides of a trial are not enough to identify it: the other values are defaults, which may change, and the name of
a base does not say how the base was made. So a result stores all values. Keys that a result lacks are filled in from
the defaults that they had when they were added: old results stay valid when a new feature adds a key, if the feature
was off by default. If a default changes, the results made with the old value no longer count.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

from sgpo_async.config import load, to_plain
from sgpo_async.config.experiment import BASE, Base, Experiment
from sgpo_async.config.schema import Run
from sgpo_async.files import to_json

Plain = dict[str, Any]
"""A configuration, or a part of it, as it is stored in a file."""

# Keys that do not affect what a trial learns, beside those of `hub`. A trial is one process without a folder, a hub,
# actors or other ranks, and with the embedded engine, so nothing except validation reads most of them; recomputing or
# offloading activations changes no gradient.
# learner.patterns and learner.token_classes are not among them: the curves hold what they measure.
NOT_LEARNED = (
    "name",
    "out",
    "local",
    "learner.canary_every",
    "learner.project",
    "learner.trackers",
    "engine.sglang",
    "evaluation.share",
    "learner.parts",
    "learner.recompute",
    "learner.offload_activations",
    "learner.resume",
    "learner.shard_over",
    "learner.checkpoint_minutes",
)

# The former defaults of keys that a result may lack: it was made with these.
FIRST_DEFAULTS = {"algorithm": {"teacher_temperature": 1.0, "distil_skip": 0}}


def configuration(experiment: Experiment, run: Run) -> Plain:
    """Every key of a trial's configuration, with the recipe of the base instead of its name."""
    plain = to_plain(run)
    path = plain["model"]["path"]
    plain["model"]["path"] = recipe(experiment, path.removeprefix(BASE)) if path.startswith(BASE) else path
    return plain


def recipe(experiment: Experiment, name: str) -> Plain:
    """How this base is made, including the recipes of the bases that it starts from."""
    base = experiment.bases[name]
    if base.train:
        overrides = experiment.overrides(base.train, {"model.path": base.start})
        return {"trained": configuration(experiment, experiment.run(overrides))}
    start = recipe(experiment, base.start.removeprefix(BASE)) if base.start.startswith(BASE) else base.start
    return {"pretrained": base.pretraining | {"start": start}}


def identity(config: Plain) -> str:
    """The identity of a trial with this configuration, which may be new or read from a result."""
    content = json.dumps(_decisive(config), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def same_recipe(one: object, other: object) -> bool:
    """Whether two recipes make the same base; each may be new or read from a file."""
    return decisive_origin(one) == decisive_origin(other)


def decisive_origin(origin: object) -> object:
    """The path of a model unchanged; a recipe with its missing keys, and without keys that do not affect a trial."""
    match origin:
        case {"trained": dict(config)}:
            return {"trained": _decisive(config)}
        case {"pretrained": dict(made)}:
            whole = filled(made, Base().pretraining)
            return {"pretrained": whole | {"start": decisive_origin(whole.get("start"))}}
    return origin


def _decisive(config: Plain) -> Plain:
    """The whole configuration without the keys that do not affect a trial."""
    # Through JSON, which turns infinity into null, so that a new configuration equals one that was read.
    whole: Plain = json.loads(to_json(filled(config, _defaults())))
    for key in NOT_LEARNED:
        *sections, last = key.split(".")
        place = whole
        for section in sections:
            place = place[section]
        place.pop(last, None)
    whole["hub"] = {"max_lag": whole["hub"]["max_lag"]}  # a trial has no hub, and every token is max_lag versions old
    whole["model"]["path"] = decisive_origin(whole["model"]["path"])
    return whole


def filled(stored: Plain, defaults: Plain) -> Plain:
    """`stored`, with the defaults of the keys that it lacks, also inside its sections."""
    return defaults | {
        key: filled(value, defaults[key]) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in stored.items()
    }


@cache
def _defaults() -> Plain:
    """The default of each key when it was added."""
    return filled(FIRST_DEFAULTS, to_plain(load("")))

"""Configuration: frozen dataclasses, which are read and validated once."""

from sgpo_async.config.agreement import agreed
from sgpo_async.config.builtin import builtin_names
from sgpo_async.config.load import by_key_path, from_plain, given_keys, load, overridden, to_plain, to_yaml
from sgpo_async.config.schema import (
    Algorithm,
    BenchmarkFile,
    Correction,
    Engine,
    Evaluation,
    Hub,
    Learner,
    Local,
    Model,
    Optim,
    Rollout,
    Run,
    Tasks,
)

__all__ = [
    "Algorithm",
    "BenchmarkFile",
    "Correction",
    "Engine",
    "Evaluation",
    "Hub",
    "Learner",
    "Local",
    "Model",
    "Optim",
    "Rollout",
    "Run",
    "Tasks",
    "agreed",
    "builtin_names",
    "by_key_path",
    "from_plain",
    "given_keys",
    "load",
    "overridden",
    "to_plain",
    "to_yaml",
]

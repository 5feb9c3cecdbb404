"""An experiment file: which methods are compared, in which settings, with which seeds.

    name: methods
    config: run.yaml                          # configuration of every trial, relative to this file; optional
    common: {steps: 96}                       # overrides for all trials, then those of setting, method, learning rate
    bases: {sparse: {p_true: 0.35, p_favourite: 0.57, start: builtin:cues, steps: 300}}
    settings: {2 %: {}, 0.5 %: {model.path: base:sparse}}
    methods: {GRPO: {algorithm.objective: grpo, rollout.autonomous: 12, rollout.guided: 0}}
    seeds: [0, 1, 2]
    tune: {rates: [3.0e-4, 6.0e-4], seeds: [100]}
    reference: GRPO                           # method that the others are compared with, seed by seed; optional
    figures: [{kind: curves, setting: 2 %}]   # figures of the page; default: every kind, in every setting

Keys of `common`, `settings` and `methods` are the keys of a run's configuration, written with dots. If a method needs
another value in each setting, the value is a mapping from the settings' names. `from` begins a method with the keys of
a configuration, e.g. {from: builtin:methods/opsd}; a relative path is relative to this file. A method or a setting that
sets `optim.lr` itself, or begins with a configuration that sets it, is not tuned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpo_async.config.builtin import is_builtin, located
from sgpo_async.config.load import by_key_path, load, read_yaml
from sgpo_async.config.rules import PATH, require, require_finite
from sgpo_async.config.schema import Run
from sgpo_async.errors import ConfigError

BASE = "base:"  # prefix in `model.path` for the name of a base
FIGURE_KINDS = ("curves", "alpha", "masked", "entropy")
METRIC = "metric"  # the kind of a figure that shows Figure.metric
MEASURED = (  # the metrics of a step whose means the points of a curve have
    "loss",
    "grpo_loss",
    "kd_loss",
    "entropy",
    "alpha",
    "kl_mean",
    "kl_masked_mass",
    "correction_clipped",
    "grad_norm",
    "pass_auto",
    "pass_guided",
    "reward_auto",
    "length_auto",
)
# Metrics that are objects: the points have each entry, as KEY/NAME.
MEASURED_BY_NAME = ("patterns", "quotes", "kl_classes")
DRAWN = ("guided", *MEASURED)  # what a figure of the kind metric can show, beside entries of MEASURED_BY_NAME
RECIPE = "from"  # in a method: a configuration whose keys it begins with
MOST_CURVES = 12  # in one figure: as many as can be told apart by colour and dashes

Domain = Literal["cues", "chains"]
"""The built-in domains."""

PRETRAINING: dict[Domain, dict[str, float]] = {
    "cues": {"steps": 1200, "p_true": 0.44, "p_favourite": 0.50},
    "chains": {"steps": 1800, "p_true": 0.36, "p_favourite": 0.58},
}
"""Optimiser steps, and the probabilities of the true guess and of the favourite one, which is wrong."""

Overrides = dict[str, Any]
"""Keys of a run's configuration, with dots, and their values."""


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base policy that the experiment creates before its trials: pretrained, or trained from another policy.

    With `train`, a trial with these overrides trains it from `start`: a warm-up, and the other settings are not used.
    Without, it is pretrained on a built-in domain (see `sgpo_async.tasks.pretrain`), from random weights or `start`.
    """

    start: str = field(default="", metadata=PATH)  # path of a model, or base:NAME
    train: Overrides = field(default_factory=dict)
    domain: Domain = "cues"
    contexts: bool = False  # whether it reads solutions and answers as well as strategies
    seed: int = 7
    steps: int | None = None  # default: that of the domain in PRETRAINING, as of the two below
    p_true: float | None = None  # probability of the true technique or meaning, unguided
    p_favourite: float | None = None  # probability of a wrong one

    def check(self, where: str) -> None:
        """Raise ConfigError unless a policy can be pretrained with these settings."""
        found = self.pretraining
        require(found["steps"] >= 1, f"{where}.steps", "must be >= 1", found["steps"])
        for key in ("p_true", "p_favourite"):
            require(found[key] >= 0, f"{where}.{key}", "must be >= 0", found[key])
        total = found["p_true"] + found["p_favourite"]
        require(total <= 1, where, "must have p_true and p_favourite whose sum is <= 1", total)

    @property
    def pretraining(self) -> dict[str, Any]:
        """The settings that determine what is pretrained, with the defaults of the domain, and without `start`."""
        own = {key: getattr(self, key) for key in ("domain", "contexts", "seed", *PRETRAINING[self.domain])}
        return own | {key: value for key, value in PRETRAINING[self.domain].items() if own[key] is None}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Learning rates to choose from, tried with separate seeds and judged on validation problems."""

    rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [100])
    finalists: int = 0  # so many rates, the best with the first seed, are tried with the other seeds; 0: all
    setting: str = ""  # the one setting in which rates are tried, for all settings; default: in each setting


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the experiment's page."""

    kind: str  # one of FIGURE_KINDS, or metric
    metric: str = ""  # kind=metric: one of DRAWN, or an entry of one of MEASURED_BY_NAME, e.g. patterns/leak
    setting: str = ""
    methods: list[str] = field(default_factory=list)  # whose curves it has; default: all
    name: str = ""  # what its file's name has behind kind and setting

    @property
    def stem(self) -> str:
        """Its file's name without the ending."""
        return "-".join(word for word in (self.kind, slug(self.metric), slug(self.setting), slug(self.name)) if word)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment file."""

    name: str
    title: str = ""
    config: str = field(default="", metadata=PATH)
    common: Overrides = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)
    settings: dict[str, Overrides] = field(default_factory=dict)  # none: one setting without a name
    methods: dict[str, Overrides]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tune: Tune = field(default_factory=Tune)
    reference: str = ""  # the method that the others are compared with, seed by seed
    figures: list[Figure] | None = None  # default: every kind of figure in every setting, of all methods

    def __post_init__(self) -> None:
        require_finite(self)
        for name, base in self.bases.items():
            require_finite(base, f"bases.{name}.")
        require(bool(self.name) and "/" not in self.name, "name", "must be a folder name without /", self.name)
        require(bool(self.methods), "methods", "must name at least one method", self.methods)
        require(bool(self.seeds), "seeds", "must name at least one seed", self.seeds)
        require(
            self.reference in {*self.methods, ""},
            "reference",
            f"must be one of the methods {', '.join(self.methods)}",
            self.reference,
        )
        settings = set(self.settings) or {""}
        require(
            self.tune.setting in settings | {""},
            "tune.setting",
            f"must be one of the settings {', '.join(sorted(settings))}",
            self.tune.setting,
        )
        for one, other in combinations(self.settings, 2):
            require(
                slug(one) != slug(other),
                "settings",
                "must have names that still differ as file names (lower case; - for all but a-z, 0-9 and .)",
                f"{one}, {other}",
            )
        self._check_tuning()
        for name, overrides in self.methods.items():
            for key, value in overrides.items():
                require(
                    not isinstance(value, dict) or set(value) == settings,
                    f"methods.{name}.{key}",
                    f"must have a value for each of the settings {', '.join(sorted(settings))}",
                    value,
                )
        self._check_figures()
        self._check_bases()

    def _check_tuning(self) -> None:
        if not self.tune.rates:
            return
        layers = {"common": self.common, f"settings.{self.tune.setting}": self.settings.get(self.tune.setting, {})}
        for layer, overrides in layers.items():
            require(
                "optim.lr" not in overrides,
                f"{layer}.optim.lr",
                "must be absent, because tune.rates sets the learning rate",
                overrides.get("optim.lr"),
            )
        require(bool(self.tune.seeds), "tune.seeds", "must name at least one seed", self.tune.seeds)
        require(self.tune.finalists >= 0, "tune.finalists", "must be >= 0", self.tune.finalists)
        require(
            not set(self.tune.seeds) & set(self.seeds),
            "tune.seeds",
            f"must differ from seeds {', '.join(map(str, self.seeds))}, because the trials that choose a rate must "
            "not also judge it",
            self.tune.seeds,
        )

    def _check_bases(self) -> None:
        for name, base in self.bases.items():
            require(
                not base.train or base == Base(start=base.start, train=base.train),
                f"bases.{name}",
                "must have no setting beside start and train: it is trained, not pretrained",
                ", ".join(one.name for one in fields(Base) if getattr(base, one.name) != getattr(Base(), one.name)),
            )
            if base.train:
                require(bool(base.start), f"bases.{name}.start", "must name the model that train continues", base.start)
            else:
                base.check(f"bases.{name}")
            require(
                not base.start.startswith(BASE) or base.start.removeprefix(BASE) in self.bases,
                f"bases.{name}.start",
                f"must name one of the bases {', '.join(self.bases)}",
                base.start,
            )

    def _check_figures(self) -> None:
        figures = self.figures or []
        every = (*FIGURE_KINDS, METRIC)
        kinds, settings, methods = ", ".join(every), [*self.settings] or [""], ", ".join(self.methods)
        for place, figure in enumerate(figures):
            where = f"figures[{place}]"
            require(figure.kind in every, f"{where}.kind", f"must be one of {kinds}", figure.kind)
            known = figure.metric in DRAWN or figure.metric.partition("/")[0] in MEASURED_BY_NAME
            rule = f"must be one of {', '.join(DRAWN)}, patterns/NAME, quotes/NAME or kl_classes/NAME"
            require(known or figure.kind != METRIC, f"{where}.metric", rule, figure.metric)
            require(figure.kind == METRIC or not figure.metric, f"{where}.metric", "must be empty", figure.metric)
            rule = f"must be one of the settings ({', '.join(settings)})"
            require(figure.setting in settings, f"{where}.setting", rule, figure.setting)
            for name in figure.methods:
                require(name in self.methods, f"{where}.methods", f"must name methods of this file ({methods})", name)
            count = len(figure.methods or self.methods)
            require(count <= MOST_CURVES, f"{where}.methods", f"must have at most {MOST_CURVES} methods", count)
        stems = [figure.stem for figure in figures]
        rule = "must have names that differ as names of files"
        require(len(set(stems)) == len(stems), "figures", rule, ", ".join(stems))

    def keys(self, setting: str, method: str) -> Overrides:
        """Overrides of one cell of the table, setting and method, without `common`."""
        own = {key: value[setting] if isinstance(value, dict) else value for key, value in self.methods[method].items()}
        return self.settings[setting] | own

    def overrides(self, *layers: Mapping[str, Any]) -> tuple[str, ...]:
        """`common` and further layers as sorted `key=value` overrides; later layers replace earlier ones."""
        merged = dict(self.common)
        for layer in layers:
            merged |= layer
        return tuple(f"{key}={_yaml_line(value)}" for key, value in sorted(merged.items()))

    def run(self, overrides: tuple[str, ...]) -> Run:
        """The configuration of a trial. Raises ConfigError."""
        return _load(self.config, overrides)


@cache  # planning loads the same trial many times
def _load(config: str, overrides: tuple[str, ...]) -> Run:
    return load(config, overrides)


def load_experiment(path: str | Path) -> Experiment:
    """Read and validate an experiment file and the configuration of each of its trials and bases.

    Raises ConfigError, one line: file, key path, rule, value.
    """
    path = Path(path)
    content = read_yaml(path, Experiment)
    try:
        if isinstance(methods := content.get("methods"), dict):
            content["methods"] = {name: _with_recipe(name, own, path) for name, own in methods.items()}
        experiment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {str(error.msg).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    assert isinstance(experiment, Experiment)
    experiment = replace(
        experiment,
        config=experiment.config and str(_beside(path, experiment.config)),
        settings=experiment.settings or {"": {}},
    )
    for setting in experiment.settings:
        for method in experiment.methods:
            _check(path, experiment, experiment.overrides(experiment.keys(setting, method)))
    for base in experiment.bases.values():
        _check(path, experiment, experiment.overrides(base.train))
    return experiment


def _with_recipe(name: str, method: Any, path: Path) -> Any:
    """The keys of a method, after those of the configuration that it begins with. Raises ConfigError."""
    if not isinstance(method, dict) or RECIPE not in method:
        return method
    recipe = method[RECIPE]
    rule = "must be a path, relative to this file, or the name of a configuration of the package"
    require(isinstance(recipe, str) and bool(recipe), f"methods.{name}.{RECIPE}", rule, recipe)
    begun = read_yaml(_beside(path, recipe), Run)
    return dict(by_key_path(begun)) | {key: value for key, value in method.items() if key != RECIPE}


def _beside(path: Path, name: str) -> Path:
    """The configuration `name`; a relative path is relative to the folder of the file at `path`."""
    return located(name) if is_builtin(name) else located(path).parent / name


def _check(path: Path, experiment: Experiment, overrides: tuple[str, ...]) -> None:
    """Raise ConfigError unless these overrides give a valid run whose base, if any, the experiment has."""
    try:
        run = experiment.run(overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    name = run.model.path.removeprefix(BASE)
    require(
        not run.model.path.startswith(BASE) or name in experiment.bases,
        f"{path}: model.path",
        f"must name one of the bases {', '.join(experiment.bases)}",
        run.model.path,
    )


def _yaml_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")

"""An experiment file: which methods are compared, in which settings, with which seeds.

    name: methods
    config: run.yaml                          # what every trial begins with, beside this file; may be missing
    common: {steps: 96}                       # laid over it, as are setting, method and learning rate, in this order
    bases: {sparse: {p_true: 0.35, p_favourite: 0.57, start: builtin:cues, steps: 300}}
    settings: {2 %: {}, 0.5 %: {model.path: base:sparse}}
    methods: {GRPO: {algorithm.objective: grpo, rollout.autonomous: 12, rollout.guided: 0}}
    seeds: [0, 1, 2]
    tune: {rates: [3.0e-4, 6.0e-4], seeds: [100]}
    reference: GRPO                           # with whom the others are compared, seed by seed; may be missing
    figures: [{kind: curves, setting: 2 %}]   # which figures the page has; default: every kind, in every setting

Keys of `common`, `settings` and `methods` are those of a run, written with dots. A method's value that differs from
setting to setting is a mapping of their names. A method or a setting that names `optim.lr` itself is not tuned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpo_async.config.load import check_keys, load, read_yaml
from sgpo_async.config.schema import Run, require
from sgpo_async.errors import ConfigError

BASE = "base:"  # how `model.path` names a base of the experiment
FIGURE_KINDS = ("curves", "alpha", "masked", "entropy")
MOST_CURVES = 12  # in one figure: as many as can be told apart by colour and dashes

Words = dict[str, Any]
"""Keys of a run, with dots, and their values."""


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base policy that is made before the trials: of the built-in domain, or by training another one.

    With `train` it is what a trial with these keys makes of `start`: a warm-up. Without, it is pretrained (see
    `sgpo_async.tasks.pretrain`), anew or from `start`.
    """

    start: str = ""  # a model's path, or base:NAME
    train: Words = field(default_factory=dict)
    seed: int = 7
    steps: int = 1200
    p_true: float = 0.44  # of the true technique, unguided
    p_favourite: float = 0.50  # of a wrong one


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Learning rates, tried with seeds of their own and judged on validation problems."""

    rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [100])
    setting: str = ""  # the one in which they are tried, for all settings; default: each has its own


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the experiment's page."""

    kind: str  # one of FIGURE_KINDS
    setting: str = ""
    methods: list[str] = field(default_factory=list)  # whose curves it has; default: all
    name: str = ""  # what its file's name has behind kind and setting

    @property
    def stem(self) -> str:
        """Its file's name without the ending."""
        return "-".join(word for word in (self.kind, slug(self.setting), slug(self.name)) if word)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything about one experiment."""

    name: str
    title: str = ""
    config: str = ""
    common: Words = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)
    settings: dict[str, Words] = field(default_factory=dict)  # none: one, without a name
    methods: dict[str, Words]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tune: Tune = field(default_factory=Tune)
    reference: str = ""  # the method with which the others are compared, seed by seed
    figures: list[Figure] | None = None  # default: every kind of figure in every setting, of all methods

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", "is a folder's name", self.name)
        require(bool(self.methods), "methods", "names at least one", self.methods)
        require(bool(self.seeds), "seeds", "names at least one", self.seeds)
        known = ", ".join(self.methods)
        require(self.reference in {*self.methods, ""}, "reference", f"is one of the methods ({known})", self.reference)
        settings = set(self.settings) or {""}
        require(
            self.tune.setting in settings | {""},
            "tune.setting",
            f"is one of the settings ({', '.join(sorted(settings))})",
            self.tune.setting,
        )
        for one, other in combinations(self.settings, 2):
            require(slug(one) != slug(other), "settings", "have names that differ as names of files", f"{one}, {other}")
        if self.tune.rates:
            layers = {"common": self.common, f"settings.{self.tune.setting}": self.settings.get(self.tune.setting, {})}
            for place, words in layers.items():
                require("optim.lr" not in words, f"{place}.optim.lr", "is left to tune.rates", words.get("optim.lr"))
            require(bool(self.tune.seeds), "tune.seeds", "names at least one", self.tune.seeds)
            require(
                not set(self.tune.seeds) & set(self.seeds),
                "tune.seeds",
                f"has none of seeds ({', '.join(map(str, self.seeds))}), which would judge a rate that they chose",
                self.tune.seeds,
            )
        for name, words in self.methods.items():
            for key, value in words.items():
                require(
                    not isinstance(value, dict) or set(value) == settings,
                    f"methods.{name}.{key}",
                    f"has a value for each setting ({', '.join(sorted(settings))})",
                    value,
                )
        self._check_figures()
        for name, base in self.bases.items():
            known = base.start.removeprefix(BASE)
            require(
                not base.start.startswith(BASE) or known in self.bases,
                f"bases.{name}.start",
                f"names another base ({', '.join(self.bases)})",
                base.start,
            )

    def _check_figures(self) -> None:
        figures = self.figures or []
        kinds, settings, methods = ", ".join(FIGURE_KINDS), [*self.settings] or [""], ", ".join(self.methods)
        for place, figure in enumerate(figures):
            where = f"figures[{place}]"
            require(figure.kind in FIGURE_KINDS, f"{where}.kind", f"must be one of {kinds}", figure.kind)
            rule = f"must be one of the settings ({', '.join(settings)})"
            require(figure.setting in settings, f"{where}.setting", rule, figure.setting)
            for name in figure.methods:
                require(name in self.methods, f"{where}.methods", f"must name methods of this file ({methods})", name)
            count = len(figure.methods or self.methods)
            require(count <= MOST_CURVES, f"{where}.methods", f"must have at most {MOST_CURVES} methods", count)
        stems = [figure.stem for figure in figures]
        rule = "must have names that differ as names of files"
        require(len(set(stems)) == len(stems), "figures", rule, ", ".join(stems))

    def keys(self, setting: str, method: str) -> Words:
        """What a cell of the table says, without `common`."""
        own = {key: value[setting] if isinstance(value, dict) else value for key, value in self.methods[method].items()}
        return self.settings[setting] | own

    def words(self, *layers: Mapping[str, Any]) -> tuple[str, ...]:
        """`common` and further layers as `key=value`, later ones over earlier ones."""
        merged = dict(self.common)
        for layer in layers:
            merged |= layer
        return tuple(f"{key}={_in_line(value)}" for key, value in sorted(merged.items()))

    def run(self, words: tuple[str, ...]) -> Run:
        """The configuration of a trial. Raises ConfigError."""
        return _load(self.config, words)


@cache  # plans ask for the same trial again and again
def _load(config: str, words: tuple[str, ...]) -> Run:
    return load(config, words)


def load_experiment(path: str | Path) -> Experiment:
    """Read and validate an experiment file, with every configuration that it leads to.

    Raises ConfigError, one line: file, key path, rule, value.
    """
    path = Path(path)
    content = read_yaml(path)
    check_keys(str(path), content, Experiment, "")
    try:
        experiment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {str(error.msg).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    assert isinstance(experiment, Experiment)
    experiment = replace(
        experiment,
        config=experiment.config and str(path.parent / experiment.config),
        settings=experiment.settings or {"": {}},
    )
    for setting in experiment.settings:
        for method in experiment.methods:
            _check(path, experiment, experiment.words(experiment.keys(setting, method)))
    for base in experiment.bases.values():
        _check(path, experiment, experiment.words(base.train))
    return experiment


def _check(path: Path, experiment: Experiment, words: tuple[str, ...]) -> None:
    try:
        run = experiment.run(words)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    name = run.model.path.removeprefix(BASE)
    require(
        not run.model.path.startswith(BASE) or name in experiment.bases,
        f"{path}: model.path",
        f"names one of the bases ({', '.join(experiment.bases)})",
        run.model.path,
    )


def _in_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")

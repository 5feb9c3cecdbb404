"""When two trials are the same, when a stored result is stale, and which code made a result."""

import importlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgpo_async.config import experiment as experiments
from sgpo_async.config.experiment import Base, load_experiment
from sgpo_async.config.schema import Algorithm, Correction, Run
from sgpo_async.errors import SgpoError
from sgpo_async.experiments import code_version, identity
from sgpo_async.experiments.experiment import _Runner
from sgpo_async.experiments.plan import Trial, trial
from sgpo_async.experiments.results import read_results
from sgpo_async.files import to_json

loading = importlib.import_module("sgpo_async.config.load")  # `config.load` names the function

BASES: dict[str, Any] = {
    "second": {"seed": 11},
    "further": {"start": "base:second", "steps": 300},
    "warm": {"start": "base:further", "train": {"algorithm.objective": "sft", "steps": 12}},
}

Schema = Callable[[type[Run]], None]


@dataclass(frozen=True, kw_only=True)
class NewDefault(Run):
    """The schema of a later version with a changed default."""

    algorithm: Algorithm = field(default_factory=lambda: Algorithm(alpha0=0.7))


@dataclass(frozen=True, kw_only=True)
class NewAlgorithm(Algorithm):
    """With one more key."""

    patience: int = 3


@dataclass(frozen=True, kw_only=True)
class NewKeys(Run):
    """The schema of a later version with a new key in a section, and a new section."""

    algorithm: NewAlgorithm = field(default_factory=NewAlgorithm)
    extra: Correction = field(default_factory=Correction)


@pytest.fixture
def schema(monkeypatch: pytest.MonkeyPatch) -> Iterator[Schema]:
    """Replaces the configuration schema by that of another version of the package."""

    def clear_caches() -> None:
        experiments._load.cache_clear()
        identity._defaults.cache_clear()

    def use(run: type[Run]) -> None:
        monkeypatch.setattr(loading, "Run", run)
        clear_caches()

    yield use
    monkeypatch.undo()
    clear_caches()


def trial_of(folder: Path, *, cell: tuple[str, str] = ("", "ours"), config_text: str = "", **change: Any) -> Trial:
    """A trial of a small experiment file with the given changes; `config_text` is its configuration file."""
    content = {"name": "small", "common": {"steps": 6}, "methods": {"ours": {}}, "bases": BASES} | change
    if config_text:
        (folder / "run.yaml").write_text(config_text)
        content["config"] = "run.yaml"
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    experiments._load.cache_clear()  # the cache's key is the path of run.yaml, not its content
    return trial(load_experiment(folder / "small.yaml"), cell, rate=1e-3, seed=0)


def on(base: str, **methods: Any) -> dict[str, Any]:
    return {"methods": {"ours": {"model.path": f"base:{base}"} | methods}}


def store(trial: Trial, folder: Path, name: str = "any") -> Path:
    """Write a result under an arbitrary file name, and return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(to_json({"version": "0.1.0", "config": trial.config, "rate": trial.rate}))
    return folder


def ids_in(folder: Path) -> set[str]:
    return set(read_results(folder))


def test_a_result_is_found_by_its_content(tmp_path: Path) -> None:
    for base in BASES:
        one = trial_of(tmp_path, **on(base))
        assert ids_in(store(one, tmp_path / base)) == {one.id}
    unlimited = trial_of(tmp_path, methods={"ours": {"optim.grad_clip": float("inf")}})  # JSON has no infinity
    assert ids_in(store(unlimited, tmp_path / "unlimited")) == {unlimited.id}
    assert unlimited.id != trial_of(tmp_path).id


@pytest.mark.parametrize("base", ["", *BASES])
def test_a_changed_default_makes_results_stale(tmp_path: Path, schema: Schema, base: str) -> None:
    change = on(base) if base else {}
    before = trial_of(tmp_path, **change)
    store(before, tmp_path / "results")
    schema(NewDefault)
    assert before.overrides == trial_of(tmp_path, **change).overrides
    assert trial_of(tmp_path, **change).id not in ids_in(tmp_path / "results")
    explicit = trial_of(tmp_path, common={"steps": 6, "algorithm.alpha0": 1.0}, **change)
    assert explicit.id in ids_in(tmp_path / "results"), "the result is found if the old default is set explicitly"


@pytest.mark.parametrize("base", ["", *BASES])
def test_a_new_key_makes_no_result_stale(tmp_path: Path, schema: Schema, base: str) -> None:
    change = on(base) if base else {}
    store(trial_of(tmp_path, **change), tmp_path / "results")
    schema(NewKeys)
    after = trial_of(tmp_path, **change)
    assert {"patience", "alpha0"} <= after.config["algorithm"].keys()
    assert after.id in ids_in(tmp_path / "results")
    used = trial_of(tmp_path, common={"steps": 6, "algorithm.patience": 4}, **change)
    assert used.id not in ids_in(tmp_path / "results")


def test_a_removed_key_makes_results_stale(tmp_path: Path, schema: Schema) -> None:
    schema(NewKeys)
    store(trial_of(tmp_path), tmp_path / "results")
    schema(Run)
    assert trial_of(tmp_path).id not in ids_in(tmp_path / "results")


def test_a_new_key_in_a_recipe_does_not_change_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial_of(tmp_path, **on("second"))
    store(one, tmp_path / "results")
    del one.config["model"]["path"]["pretrained"]["p_true"]  # like a result of a version without this key
    store(one, tmp_path / "older")
    assert ids_in(tmp_path / "older") == ids_in(tmp_path / "results")
    monkeypatch.setattr(identity, "Base", lambda: Base(p_true=0.3))
    assert ids_in(tmp_path / "older") != ids_in(tmp_path / "results")


@pytest.mark.parametrize(
    "change",
    [
        {"methods": {"renamed": {}}, "cell": ("", "renamed")},
        {"name": "another", "seeds": [0], "tune": {"rates": [1e-4]}, "bases": {}},
        {"settings": {"calm": {"steps": 6}}, "common": {}, "cell": ("calm", "ours")},
        {"methods": {"ours": {"model.path": "builtin:cues", "algorithm.alpha0": 1}}},
        {"common": {}, "config_text": "steps: 6\noptim: {lr: 5.0e-4}\n"},
        {"common": {"steps": 6, "name": "x", "out": "y", "local.ranks": 1, "hub.max_message_mb": 4096}},
        {"common": {"steps": 6, "hub.heartbeat_s": 3, "hub.max_messages_per_s": 77, "hub.stale": "mask"}},
        {"common": {"steps": 6, "engine.sglang.phase_timeout_s": 7.0}},
    ],
)
def test_equivalent_files_give_the_same_trial(tmp_path: Path, change: dict[str, Any]) -> None:
    assert trial_of(tmp_path, **change).id == trial_of(tmp_path).id


@pytest.mark.parametrize(
    "change",
    [
        {"common": {"steps": 7}},
        {"common": {"steps": 6, "hub.max_lag": 3}},
        {"config_text": "algorithm: {alpha0: 0.5}\n"},
        {"methods": {"ours": {"model.path": "base:second"}}},
    ],
)
def test_a_different_value_gives_a_different_trial(tmp_path: Path, change: dict[str, Any]) -> None:
    assert trial_of(tmp_path, **change).id != trial_of(tmp_path).id


def test_a_base_is_identified_by_its_recipe_and_not_by_its_name(tmp_path: Path) -> None:
    renamed = {
        "other": BASES["second"],
        "longer": BASES["further"] | {"start": "base:other"},
        "hot": BASES["warm"] | {"start": "base:longer"},
    }
    for old, new in zip(BASES, renamed, strict=True):
        assert trial_of(tmp_path, **on(old)).id == trial_of(tmp_path, bases=renamed, **on(new)).id


@pytest.mark.parametrize(
    ("base", "key", "value", "stale"),
    [
        ("second", "seed", 12, {"second", "further", "warm"}),
        ("further", "steps", 301, {"further", "warm"}),
        ("further", "start", "builtin:cues", {"further", "warm"}),
        ("warm", "train", {"algorithm.objective": "sft", "steps": 13}, {"warm"}),
    ],
)
def test_a_changed_recipe_makes_its_base_and_those_that_start_from_it_stale(
    tmp_path: Path, base: str, key: str, value: object, stale: set[str]
) -> None:
    changed = BASES | {base: BASES[base] | {key: value}}
    before = {name: trial_of(tmp_path, **on(name)).id for name in BASES}
    after = {name: trial_of(tmp_path, bases=changed, **on(name)).id for name in BASES}
    assert {name for name in BASES if before[name] != after[name]} == stale


def test_a_warm_up_is_identified_by_its_whole_configuration(tmp_path: Path) -> None:
    """That includes the keys that all trials share; a trial's own overrides do not change its warm-up."""
    one = trial_of(tmp_path, common={"steps": 6, "optim.beta2": 0.9}, **on("warm", **{"optim.beta2": 0.95}))
    other = trial_of(tmp_path, **on("warm"))
    assert one.config["optim"] == other.config["optim"]
    assert one.id != other.id


def test_every_ignored_key_exists() -> None:
    for key in identity.NOT_LEARNED:
        attrgetter(key)(Run())


def test_files_without_a_configuration_are_reported_in_one_line_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = trial_of(tmp_path)
    folder = store(one, tmp_path / "results", name="0")
    (folder / f"{one.id}.json").write_text(json.dumps({"version": "0.1.0", "words": list(one.overrides), "rate": 1e-3}))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert set(read_results(folder)) == {one.id}
    assert caplog.messages == [
        f"{folder / one.id}.json: holds no configuration; not counted, so the trial is run again: move such files out "
        f"of {folder}"
    ]
    for name, text in {"x1": "{", "x2": "[]"}.items():
        (folder / f"{name}.json").write_text(text)
    assert set(read_results(folder)) == {one.id}
    assert len(caplog.messages) == 2
    assert "and 2 more hold no configuration" in caplog.messages[1]
    assert before.items() <= {file: file.read_bytes() for file in folder.iterdir()}.items()


@pytest.mark.parametrize("on_disk", ["another", "older", "none"])
def test_a_base_made_by_another_recipe_is_refused(tmp_path: Path, on_disk: str) -> None:
    trial_of(tmp_path)
    experiment = load_experiment(tmp_path / "small.yaml")
    recipe = identity.recipe(experiment, "warm")
    folder = tmp_path / "bases" / "warm"
    folder.mkdir(parents=True)
    runner = _Runner(experiment, tmp_path, in_time=lambda: True)
    (folder / "base.json").write_text(to_json({"recipe": recipe}))
    runner._check_base("warm")
    runner._check_base("second")  # not made yet
    if on_disk == "another":
        recipe["trained"]["steps"] += 1
    (folder / "base.json").write_text(to_json({"recipe": {"seed": 7} if on_disk == "older" else recipe}))
    if on_disk == "none":
        (folder / "base.json").unlink()
    with pytest.raises(SgpoError, match=r"does not hold the recipe of bases\.warm; move the folder away") as caught:
        runner._check_base("warm")
    assert "\n" not in str(caught.value)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version.commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message=first")
    git(tmp_path, "tag", "--annotate", "--message=a name is not a commit", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert code_version.commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert code_version.commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "installed").mkdir()
    assert code_version.commit(tmp_path / "installed") is None, "installed below another project's checkout"

    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nsleep 5\necho late\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(code_version, "DEADLINE_S", 0.2)
    assert code_version.commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path / "installed"))
    assert code_version.commit(tmp_path) is None


def test_each_code_version_is_listed_once() -> None:
    results = [{"version": "0.1.0", "commit": commit} for commit in ("ab" * 20, "ab" * 20, f"{'cd' * 20}-dirty", None)]
    assert code_version.codes(results) == (
        "0.1.0, commit unknown; 0.1.0, commit abababababab; 0.1.0, commit cdcdcdcdcdcd-dirty"
    )

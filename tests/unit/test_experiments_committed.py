"""The committed pages are what the committed table of trials gives; both are small."""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

from sgpo_async.config.experiment import load_experiment
from sgpo_async.experiments import drawings
from sgpo_async.experiments.identity import recipe, same_recipe
from sgpo_async.experiments.parquet import read_trials
from sgpo_async.experiments.plan import Result, best_rates, final
from sgpo_async.experiments.tables import write_tables

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "results" / "experiments"
FILES = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
FIGURE = re.compile(r"\]\(([^)]*\.svg)\)")


@cache
def trials() -> dict[str, Result]:
    return read_trials(COMMITTED / "trials.parquet")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_page_is_what_the_table_gives(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "draw", lambda panels, path: path.write_text(""))
    experiment = load_experiment(file)
    write_tables(experiment, trials(), folder=tmp_path)
    committed = COMMITTED / experiment.name
    assert (tmp_path / "README.md").read_text() == (committed / "README.md").read_text()
    figures = {path.name for path in tmp_path.glob("*.svg")}
    assert figures == {path.name for path in committed.glob("*.svg")}
    planned = final(experiment, best_rates(experiment, trials()))
    assert all(trials()[trial.id]["config"]["seed"] == trial.seed for trial in planned)  # none is missing


def test_the_table_holds_the_results_that_it_was_made_of() -> None:
    """The digest is of the files, one for each trial, that stood here before there was a table, without their names.

    The names change with every key that comes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for found in sorted(json.dumps(found, sort_keys=True) for found in trials().values()):
        digest.update(f"{found}\n".encode())
    assert (len(trials()), digest.hexdigest()) == (1170, "cae6db74207f387aef0fbbee4cf3e564")


def test_bases_are_those_of_the_experiments() -> None:
    recipes = {name: recipe(one, name) for one in map(load_experiment, FILES) for name in one.bases}
    kept = {path.stem: json.loads(path.read_text()) for path in (COMMITTED / "bases").glob("*.json")}
    assert kept.keys() == recipes.keys()
    assert all(same_recipe(kept[name]["recipe"], recipes[name]) for name in kept)


def test_documents_are_small_and_link_to_figures_that_are_there() -> None:
    paths = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    figures = {path.resolve() for path in paths if path.suffix in (".svg", ".png")}
    linked = {
        (page.parent / link).resolve()
        for page in paths
        if page.suffix == ".md"
        for link in FIGURE.findall(page.read_text())
    }
    assert linked == figures
    assert len(figures) <= 12 and max(path.stat().st_size for path in figures) < 60_000
    assert sum(path.stat().st_size for path in paths) < 1_500_000

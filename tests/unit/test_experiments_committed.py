"""The committed pages follow from the committed table of trials; both are small."""

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
def test_a_page_equals_the_one_written_from_the_table(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawings, "draw", lambda panels, path: path.write_text(""))
    experiment = load_experiment(file)
    write_tables(experiment, trials(), folder=tmp_path)
    committed = COMMITTED / experiment.name
    assert (tmp_path / "README.md").read_text() == (committed / "README.md").read_text()
    figures = {path.name for path in tmp_path.glob("*.svg")}
    assert figures == {path.name for path in committed.glob("*.svg")}
    planned = final(experiment, best_rates(experiment, trials()))
    assert all(trials()[trial.id]["config"]["seed"] == trial.seed for trial in planned)  # none is missing


def test_the_table_contains_the_results_of_the_files_that_it_replaced() -> None:
    """The digest is that of the earlier files, one for each trial: no mode `clip`, no base that reads solutions,
    no problems from a file, no sharper teacher.

    It was computed from their numbers, those of curves rounded to float32.
    """
    earlier = [
        one
        for one in trials().values()
        if one["config"]["algorithm"]["grpo_correction"]["mode"] != "clip"
        and '"contexts": true' not in json.dumps(one["config"]["model"])
        and one["config"]["tasks"]["source"] != "file"
        and one["config"]["algorithm"].get("teacher_temperature", 1) == 1
    ]
    lines = "\n".join(sorted(json.dumps(found, sort_keys=True) for found in earlier))
    digest = hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
    assert (len(earlier), digest) == (1170, "3d650bd4d40a61f6da57f187b72cac1a")


def test_the_committed_bases_are_those_of_the_experiments() -> None:
    recipes = {
        name: recipe(experiment, name) for experiment in map(load_experiment, FILES) for name in experiment.bases
    }
    committed = {path.stem: json.loads(path.read_text()) for path in (COMMITTED / "bases").glob("*.json")}
    assert committed.keys() == recipes.keys()
    assert all(same_recipe(committed[name]["recipe"], recipes[name]) for name in committed)


def test_documents_are_small_and_link_to_every_existing_figure_and_no_other() -> None:
    paths = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    figures = {path.resolve() for path in paths if path.suffix in (".svg", ".png")}
    linked = {
        (page.parent / link).resolve()
        for page in paths
        if page.suffix == ".md"
        for link in FIGURE.findall(page.read_text())
    }
    assert linked == figures
    assert len(figures) <= 20 and max(path.stat().st_size for path in figures) < 60_000
    assert sum(path.stat().st_size for path in paths) < 2_000_000

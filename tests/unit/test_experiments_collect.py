"""The files that `sgpo-async experiment --collect` and `--from` write, without running a trial."""

import json
import re
from pathlib import Path

import pytest
import yaml
from experiment_support import SMALL, result, write

from sgpo_async.cli.main import main
from sgpo_async.config.experiment import load_experiment
from sgpo_async.experiments.experiment import _Runner
from sgpo_async.experiments.plan import final
from sgpo_async.files import to_json


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder with the files of an earlier --collect."""
    folder = tmp_path / "docs"
    fill(folder, {"trials.parquet", "small/curves-gone.svg", "small/README.md", "long/README.md", "README.md"})
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with two results of a small experiment."""
    folder = tmp_path / "out"
    fill(folder, {"bases/warm/base.json", "bases/warm/model.safetensors"})
    for trial in final(load_experiment(write(tmp_path, SMALL)), {("calm", "fixed"): None}):
        record = result(0.1, 0.2, 0.3 + trial.seed) | {"config": trial.config, "rate": trial.rate}
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{trial.id}.json").write_text(to_json(record))
    return folder


def fill(folder: Path, files: set[str]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def experiment(folder: Path, *arguments: str | Path) -> int:
    return main(["experiment", str(folder / "small.yaml"), *map(str, arguments)])


def test_collected_files_replace_earlier_ones(docs: Path, out: Path) -> None:
    assert experiment(docs.parent, "--out", out, "--collect", docs) == 0
    collected = {"trials.parquet", "bases/warm.json", "small/README.md", "small/curves-calm.svg"}
    assert files_in(docs) == collected | {"long/README.md", "README.md"}
    assert "| fixed | 0.001 | 2 | 80.0" in (docs / "small" / "README.md").read_text()
    assert (docs / "long" / "README.md").read_text() == "long/README.md"  # a page of another experiment


def test_a_folder_without_results_changes_nothing(docs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(docs.parent, SMALL)
    before = files_in(docs)
    assert experiment(docs.parent, "--out", docs.parent / "misspelt", "--collect", docs) == 2
    assert re.search(r"misspelt/results: must hold results of trials, got none; run .*\n$", capsys.readouterr().err)
    assert experiment(docs.parent, "--out", out, "--collect", out) == 2  # the same folder
    assert "--collect must be another folder than --out, got" in capsys.readouterr().err
    assert files_in(docs) == before


def test_a_table_gives_the_same_pages_and_another_run_continues_from_it(docs: Path, out: Path, tmp_path: Path) -> None:
    assert experiment(tmp_path, "--out", out, "--collect", docs) == 0
    assert experiment(tmp_path, "--out", tmp_path / "new", "--from", docs / "trials.parquet") == 0
    for file in ("README.md", "curves-calm.svg"):
        assert (tmp_path / "new" / "small" / file).read_text() == (docs / "small" / file).read_text()
    runner = _Runner(load_experiment(tmp_path / "small.yaml"), tmp_path / "new", in_time=lambda: True)
    records = {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}
    assert runner.results == records


def test_an_existing_result_is_kept_when_the_table_has_a_different_one(docs: Path, out: Path, tmp_path: Path) -> None:
    assert experiment(tmp_path, "--out", out, "--collect", docs) == 0
    first, second = sorted((out / "results").iterdir())
    first.write_text(to_json(json.loads(first.read_text()) | {"commit": "another"}))
    second.unlink()
    before = first.read_bytes()
    assert experiment(tmp_path, "--out", out, "--from", docs / "trials.parquet") == 0
    assert first.read_bytes() == before
    assert second.exists()


def test_the_option_all_figures_draws_every_figure(out: Path, tmp_path: Path) -> None:
    content = SMALL | {"figures": []}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert experiment(tmp_path, "--out", out, "--collect", tmp_path / "few") == 0
    assert experiment(tmp_path, "--out", out, "--collect", tmp_path / "all", "--all-figures") == 0
    assert not [*(tmp_path / "few").rglob("*.svg")]
    assert [path.name for path in (tmp_path / "all").rglob("*.svg")] == ["curves-calm.svg"]
    assert "In the figures" not in (tmp_path / "few" / "small" / "README.md").read_text()


def test_an_unreadable_table_is_reported_in_one_line(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.parquet").write_text("no Parquet")
    for file in ("other.parquet", "missing.parquet"):
        assert experiment(tmp_path, "--out", out, "--from", tmp_path / file) == 2
        error = capsys.readouterr().err
        assert f"{file}: cannot be read as a table of trials (" in error
        assert error.count("\n") == 1

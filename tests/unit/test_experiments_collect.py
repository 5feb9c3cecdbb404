"""The script that takes results over into docs/: what stands there afterwards is what OUT has."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path("docs/results/experiments/collect.sh").resolve()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder with the script and the results of an earlier time."""
    folder = tmp_path / "docs"
    fill(folder, {"results/old.json", "bases/gone.json", "methods/curves.svg", "long/README.md", "README.md"})
    shutil.copy(SCRIPT, folder)
    return folder


def fill(folder: Path, files: set[str]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {SCRIPT.name}


def collect(docs: Path, out: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", str(docs / SCRIPT.name), out]
    return subprocess.run(words, cwd=docs.parent, capture_output=True, text=True, timeout=240, check=False)


def test_what_is_collected_replaces_what_was_there(docs: Path) -> None:
    results = {"results/new.json", "methods/README.md", "methods/alpha-first-base.svg", "staleness/README.md"}
    fill(docs.parent / "out", results | {"bases/warm/base.json", "bases/warm/model.safetensors"})
    done = collect(docs, "out")  # as it is seen from where the script is called
    assert done.returncode == 0, done.stderr
    assert files_in(docs) == results | {"bases/warm.json", "README.md"}


def test_a_folder_without_results_changes_nothing(docs: Path) -> None:
    before = files_in(docs)
    (docs.parent / "out").mkdir()
    done = collect(docs, "out")
    assert done.returncode == 1
    assert done.stderr.endswith("out: has no results/*.json; nothing was changed\n")
    assert files_in(docs) == before
    assert collect(docs, "misspelt").returncode != 0
    assert collect(docs, "docs").returncode != 0  # itself
    assert files_in(docs) == before

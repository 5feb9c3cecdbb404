"""docs/design.md names what exists: every public name of its table can be imported, and every package has a row."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(r"^\| `(\w+)`(?: itself)? \| .* \| (.*) \|$", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
NAMES = [(package, name) for package, names in ROWS for name in re.findall(r"`([\w.]+)`", names)]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda part: part)
def test_a_public_name_can_be_imported(package: str, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    path = ["sgpo_async", package if package != "sgpo_async" else "", module]
    assert callable(getattr(importlib.import_module(".".join(filter(None, path))), attribute))


def test_every_package_has_a_row() -> None:
    folder = ROOT / "sgpo_async"
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {package for package, _ in ROWS} == there - {"__init__", "api"} | {"sgpo_async"}
    assert len(NAMES) > 70

"""The pictures of the committed results are those that their figures give."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from sgpo_async.bench import pictures

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


@pytest.mark.parametrize("part", pictures.PICTURES)
def test_the_committed_pictures_show_the_committed_figures(part: str) -> None:
    found = json.loads((RESULTS / part / f"{part}.json").read_text())
    for picture in pictures.PICTURES[part](found):
        committed = html.unescape((RESULTS / part / f"{picture.name}.svg").read_text())
        for name, _, text in picture.bars:
            assert f">{name}</text>" in committed, f"python -m {pictures.__name__} docs/results"
            assert f">{text}</text>" in committed, f"python -m {pictures.__name__} docs/results"


def test_a_picture_is_drawn_beside_its_figures(tmp_path: Path) -> None:
    (tmp_path / "pinned.json").write_text(json.dumps({"0": [{"learner_idle": 0.5, "problems_per_s": 1.0}]}))
    pictures.draw("pinned", tmp_path)
    assert "1 problems/s" in (tmp_path / "pinned.svg").read_text()


def test_a_bar_has_the_lengths_of_its_parts() -> None:
    runs = [{"learner_idle": idle, "problems_per_s": 50.0} for idle in (0.1, 0.25, 0.9)]
    (picture,) = pictures.PICTURES["pinned"]({"2": runs})
    assert picture.bars == [("lag 2", {"trains": 0.75, "waits for data": 0.25}, "50 problems/s")]


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pinned.json").write_text(json.dumps({"0": [{"learner_idle": 0.5, "problems_per_s": 1.0}]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pictures.draw("pinned", tmp_path)
    assert "pip install 'sgpo-async[experiments]'" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.svg"))

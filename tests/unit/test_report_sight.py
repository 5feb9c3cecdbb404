"""What a reader sees of the report: no empty charts, legible labels on a telephone, visible colours in both schemes."""

import json
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from synthetic_metrics import synthetic_lines, write_lines

from sgpo_async.metrics.names import REST, SECTIONS, section_of
from sgpo_async.report import write_report
from sgpo_async.report.charts import CHARTS, GROUPS, figures, other_figures
from sgpo_async.report.style import FONTS, STYLE
from sgpo_async.report.svg import LEFT, TOP, WIDTH

BEST, LEAST = 16.5, 11.0  # pixels of a label
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """
<script>
const texts = [...document.querySelectorAll("svg text")].map((text) => {
  const box = text.getBoundingClientRect(), card = text.closest("figure").getBoundingClientRect();
  const svg = text.closest("svg"), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const inside = box.left >= card.left && box.right <= card.right && box.top >= card.top && box.bottom <= card.bottom;
  return [text.textContent, parseFloat(getComputedStyle(text).fontSize) * scale, inside];
});
const page = document.body.getBoundingClientRect().width;
const wide = [...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > page + 0.5
  && !one.closest("section")).map((one) => one.outerHTML.slice(0, 99));
document.body.textContent = JSON.stringify({ texts, wide, page });
</script>
"""


def font_of(width: float) -> float:
    """The size in pixels of a label in a chart that is `width` pixels wide."""
    units = [size for least, size in FONTS if least <= width][-1]
    return units * width / WIDTH


def test_labels_have_a_legible_size_at_every_width() -> None:
    for width in range(250, 905):  # from two columns on, which a window of 984 pixels has, charts are narrower
        assert LEAST <= font_of(width) <= BEST, width
    for least, size in FONTS:
        assert f"@container (min-width: {least}px) {{ text {{ font-size: {size}px; }} }}" in STYLE
        assert 5.5 * 0.56 * size < LEFT and 2 * 0.8 * size < TOP + 13, "the longest tick and the two rows above fit"


def palette(scheme: str) -> dict[str, str]:
    """The colours of a scheme by their names."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    return dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_a_chart_is_seen_on_the_card(scheme: str) -> None:
    colours = palette(scheme)
    series = [name for name in colours if re.fullmatch(r"c\d|lag\d", name)]
    assert len(series) == 10 and "lag0" in series
    for name in (*series, "soft", "alarm"):
        assert contrast(colours[name], colours["card"]) >= 3, name
    for name in ("soft", "ink"):
        assert contrast(colours[name], colours["card"]) >= 4.5, name
    steps = [contrast(colours[f"lag{lag}"], colours["card"]) for lag in range(6)]
    assert all(after >= 1.3 * before for before, after in pairwise(steps)), "neighbours differ"


def without_limits(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        line | {"correction_clipped": 0.0, "kl_correction_clipped": 0.0, "canary_mean": 0, "canary_max": 0}
        for line in lines
    ]


def test_a_chart_of_zeros_is_a_sentence_behind_the_charts_of_its_section() -> None:
    parts = figures(without_limits(synthetic_lines()))
    sentences = [html for _, html in parts if "<figure" not in html]
    assert sentences == [
        '<p class="without"><b>Truncated corrections</b> 0 in every step: the bound limits no token&#x27;s weight.</p>',
        '<p class="without"><b>Canary</b> 0 in every step: engines and learner agree exactly.</p>',
    ]
    own = ["<figure" in html for group, html in parts if group == "mismatch"]
    assert own == sorted(own, reverse=True) and own.count(False) == 2
    assert not any("<figure" not in html for _, html in figures(synthetic_lines()))


def test_a_chart_without_a_measurement_is_left_out() -> None:
    """A bound alone is no measurement."""
    assert (
        figures([{"step": 1, "mismatch_bound": 1e-4, "entropy": None, "lag_histogram": {}, "loss": 1.0}])[0][0]
        == "train"
    )
    assert len(figures([{"step": 1, "mismatch_bound": 1e-4, "entropy": None, "lag_histogram": {}}])) == 0


@pytest.mark.parametrize("share", [3e-5, 4e-4, 0.004, 0.04, 0.4])
def test_a_small_share_fills_its_chart(share: float) -> None:
    lines = [{"step": step, "correction_clipped": share} for step in (1, 2, 3)]
    ((_, html),) = figures(lines)
    (path,) = re.findall(r'class="line c1" d="M[0-9.]+ ([0-9.]+)', html)
    assert float(path) < 170, "the curve is above the lowest part of the chart"


def test_the_sections_of_the_page_are_those_of_the_table_of_names(tmp_path: Path) -> None:
    assert {*SECTIONS, REST} == GROUPS.keys()
    for chart in CHARTS:
        assert chart.group in SECTIONS and section_of(chart.curves[0].key) == chart.group
    lines = [line | {"of_tomorrow": 1.0} for line in synthetic_lines(20)]
    others = other_figures(lines)
    assert {group for group, _ in others} == {"train", "mismatch", "system", REST}
    assert "Learning rate." in "".join(html for _, html in others)
    write_lines(tmp_path, lines)
    text = write_report(tmp_path).read_text()
    assert re.findall(r'<h2 class="group">(.*?)</h2>', text) == ["Evaluation", "Training", "Lag and mismatch", "System"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, to measure what it draws")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_draws_every_label_large_enough_and_inside_its_card(tmp_path: Path, width: int) -> None:
    write_lines(tmp_path, synthetic_lines())
    page = tmp_path / "measured.html"
    narrow = f"<style>html {{ width: {width}px; }}</style>{MEASURE}"  # a window has at least 500 pixels
    page.write_text(write_report(tmp_path).read_text().replace("</body>", f"{narrow}</body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [str(CHROMIUM), *options, "--dump-dom", f"--window-size={width},3000", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    found = json.loads(unescape(re.search(r"<body>(.*)</body>", dom, re.DOTALL)[1]))  # type: ignore[index]
    assert found["page"] == width and not found["wide"], "sections scroll, and nothing else is wider than the page"
    assert len(found["texts"]) > 100
    for text, pixels, inside in found["texts"]:
        assert LEAST <= pixels <= BEST and inside, (text, pixels)

"""The figures of experiments: which curves share one, their colours, and the drawing."""

import re
from pathlib import Path
from typing import Any

import pytest
from experiment_support import SMALL, result, write

from sgpo_async.config.experiment import FIGURE_KINDS, MOST_CURVES, Figure, load_experiment
from sgpo_async.errors import ConfigError
from sgpo_async.experiments import drawings
from sgpo_async.experiments.captions import figure_notes
from sgpo_async.experiments.drawings import draw_setting
from sgpo_async.experiments.figures import COLOURS, MOST_BANDS, Panel, parts

TWO_SEEDS = [result(0.1, 0.4, 0.9, alpha=0.5, entropy=0.2), result(0.2, 0.5, 0.7, alpha=0.3, entropy=0.1)]
WITHOUT_ALPHA = [result(0.1, 0.2, alpha=0.0, entropy=0.2)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Panel]]:
    """The panels of each file; nothing is drawn."""
    figures: dict[str, list[Panel]] = {}
    monkeypatch.setattr(drawings, "draw", lambda panels, path: figures.update({path.name: panels}))
    return figures


def test_at_most_twelve_methods_share_a_figure_and_none_is_lost() -> None:
    assert len(set(COLOURS)) == MOST_CURVES == 12
    for count in (1, 12, 13, 23, 24, 25, 40):
        methods = [f"method {number}" for number in range(count)]
        groups = parts(methods)
        assert [name for group in groups for name in group] == methods
        assert len(groups) == -(-count // 12)
        assert max(map(len, groups)) <= 12
    assert [len(group) for group in parts([""] * 13)] == [7, 6]


def test_many_methods_are_split_in_order_and_keep_their_colours(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    methods: dict[str, Any] = {f"m{n}": TWO_SEEDS if n % 2 else WITHOUT_ALPHA for n in range(24)}
    written = draw_setting("At 2 %", methods, tmp_path)
    kinds = ("curves", "alpha", "entropy")
    assert [*written] == [*drawn] == [f"{kind}-at-2-{part}.svg" for kind in kinds for part in (1, 2)]
    for file, panels in drawn.items():
        first = 12 if file.endswith("-2.svg") else 0
        step = 2 if file.startswith("alpha") else 1
        for panel in panels:
            expected = [(f"m{n}", n - first) for n in range(first + step - 1, first + 12, step)]
            assert [(curve.name, curve.place) for curve in panel.curves] == expected


def test_alpha_is_drawn_beside_the_pass_rate_of_the_same_methods(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    draw_setting("", {"SGPO": TWO_SEEDS, "GRPO": WITHOUT_ALPHA, "later": []}, tmp_path)
    assert [*drawn] == ["curves.svg", "alpha.svg", "entropy.svg"]
    rate, alpha = drawn["alpha.svg"]
    assert (rate.label, alpha.label) == ("validation pass rate alone, %", "mean alpha")
    assert [[curve.name for curve in panel.curves] for panel in (rate, alpha)] == [["SGPO"], ["SGPO"]]
    assert [(at, found.mean) for at, found in alpha.curves[0].points] == [(384, 0.4), (768, 0.4)]
    assert [[curve.name for curve in panel.curves] for panel in drawn["curves.svg"]] == [["SGPO", "GRPO"]]
    assert drawn["entropy.svg"][0].label == "entropy, nats per token"


def test_pass_rates_of_0_are_drawn_and_alphas_of_0_are_not(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    draw_setting("", {"lost": [result(0.0, 0.0, alpha=0.0)]}, tmp_path)
    assert [*drawn] == ["curves.svg"]


def test_figures_are_labelled_and_reproducible(tmp_path: Path) -> None:
    text, again = {}, {}
    for texts in (text, again):
        draw_setting("", {"SGPO": TWO_SEEDS, "GRPO": WITHOUT_ALPHA}, tmp_path)
        texts |= {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert text == again
    assert {"validation pass rate alone, %", "mean alpha", "rollouts generated", "SGPO"} <= labels(text["alpha.svg"])
    assert "GRPO" not in labels(text["alpha.svg"])
    assert {"entropy, nats per token", "SGPO", "GRPO"} <= labels(text["entropy.svg"])
    for file, place in {("curves.svg", 0), ("curves.svg", 1), ("alpha.svg", 0), ("entropy.svg", 0), ("entropy.svg", 1)}:
        assert COLOURS[place] in text[file]
    assert COLOURS[1] not in text["alpha.svg"]


def labels(svg: str) -> set[str]:
    return set(re.findall(r"<text[^>]*>(.*?)</text>", svg))


def test_a_figure_of_many_methods_is_small_and_has_no_overlapping_bands(tmp_path: Path) -> None:
    long = [result(*(n / m for n in range(13)), kl_masked_mass=1 / m) for m in (13, 14, 15)]
    for count in (MOST_BANDS, MOST_BANDS + 1, MOST_CURVES):
        methods = {f"a method with a name of forty letters, {n:2}": long for n in range(count)}
        draw_setting("", methods, tmp_path)
        for file in ("curves.svg", "masked.svg"):
            text = (tmp_path / file).read_text()
            assert len(text) < 60_000
            assert ("fill-opacity" in text) == (count <= MOST_BANDS)


def test_two_seeds_have_no_band(tmp_path: Path) -> None:
    draw_setting("", {"SGPO": TWO_SEEDS, "GRPO": WITHOUT_ALPHA}, tmp_path)
    assert not [path for path in tmp_path.glob("*.svg") if "fill-opacity" in path.read_text()]
    assert "intervals: those of fewer than 3 seeds" in figure_notes({"curves"}, seeds=2)[0]
    assert "bands are the same intervals" in figure_notes({"curves"}, seeds=3)[0]
    assert figure_notes(set(), seeds=3) == []


def test_a_name_longer_than_the_figure_is_wide_is_drawn(tmp_path: Path) -> None:
    draw_setting("", {"so long " * 40: TWO_SEEDS}, tmp_path, [Figure(kind="curves")])
    assert "so long so long" in (tmp_path / "curves.svg").read_text()


def test_only_the_figures_that_a_file_names_are_drawn(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    methods = {"SGPO": TWO_SEEDS, "GRPO": WITHOUT_ALPHA, "HPT": TWO_SEEDS}
    chosen = [
        Figure(kind="entropy", setting="At 2 %"),
        Figure(kind="curves", setting="At 2 %", methods=["HPT", "SGPO"], name="two of them"),
        Figure(kind="curves", setting="At 0.5 %"),
    ]
    written = draw_setting("At 2 %", methods, tmp_path, chosen)
    assert {file: figure.kind for file, figure in written.items()} == {
        "entropy-at-2.svg": "entropy",
        "curves-at-2-two-of-them.svg": "curves",
    }
    assert [curve.name for curve in drawn["curves-at-2-two-of-them.svg"][0].curves] == ["HPT", "SGPO"]
    assert draw_setting("At 2 %", methods, tmp_path, []) == {}


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ([{"kind": "bars"}], "figures[0].kind must be one of curves, alpha, masked, entropy, metric, got 'bars'"),
        ([{"kind": "curves", "setting": "wild"}], "figures[0].setting must be one of the settings (calm, stale)"),
        (
            [{"kind": "curves", "setting": "calm", "methods": ["nobody"]}],
            "figures[0].methods must name methods of this file (SGPO, GRPO, fixed), got 'nobody'",
        ),
        ([{"kind": "metric"}], "figures[0].metric must be one of guided, loss, "),
        (
            [{"kind": "metric", "metric": "lenght_auto"}],
            "patterns/NAME, quotes/NAME or kl_classes/NAME, got 'lenght_auto'",
        ),
        ([{"kind": "curves", "metric": "loss"}], "figures[0].metric must be empty, got 'loss'"),
        ([{"kind": "curves", "setting": "calm"}] * 2, "figures must have names that differ as names of files"),
    ],
)
def test_an_invalid_figure_is_refused(tmp_path: Path, figures: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, SMALL | {"figures": figures}))
    assert message in str(caught.value)


def test_any_key_of_the_curves_can_be_drawn_beside_the_pass_rate(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    leaking = [result(0.1, 0.4, **{"patterns/leak": 0.3}), result(0.1, 0.6, **{"patterns/leak": 0.1})]
    chosen = [Figure(kind="metric", metric="patterns/leak")]
    written = draw_setting("", {"SGPO": leaking, "GRPO": TWO_SEEDS}, tmp_path, chosen)
    assert {file: drawings.kind_of(figure).title for file, figure in written.items()} == {
        "metric-patterns-leak.svg": "pass rate and patterns/leak over rollouts"
    }
    rate, leak = drawn["metric-patterns-leak.svg"]
    assert [(at, found.mean) for at, found in leak.curves[0].points] == [(384, pytest.approx(0.2))]
    assert [curve.name for curve in rate.curves] == ["SGPO"]


def test_the_guided_pass_rate_is_drawn_in_per_cent(drawn: dict[str, list[Panel]], tmp_path: Path) -> None:
    draw_setting("", {"GRPO": TWO_SEEDS}, tmp_path, [Figure(kind="metric", metric="guided")])
    panel = drawn["metric-guided.svg"][1]
    assert (panel.label, panel.factor, panel.top) == ("validation pass rate guided, %", 100, 100)
    assert panel.curves[0].points


def test_a_method_without_guided_rollouts_is_not_in_the_figure_of_their_pass_rate(
    drawn: dict[str, list[Panel]], tmp_path: Path
) -> None:
    unguided = [one | {"curve": [point | {"guided": None} for point in one["curve"]]} for one in TWO_SEEDS]
    draw_setting("", {"SDPO": unguided, "SGPO": TWO_SEEDS}, tmp_path, [Figure(kind="metric", metric="guided")])
    assert [[(curve.name, curve.place) for curve in panel.curves] for panel in drawn["metric-guided.svg"]] == [
        [("SGPO", 1)],
        [("SGPO", 1)],
    ]


def test_every_kind_of_figure_can_be_drawn() -> None:
    assert [*drawings.KINDS] == [*FIGURE_KINDS]

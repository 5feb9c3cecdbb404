"""Which curves the page shows, as a literal table, and the HTML of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sgpo_async.report.lag import lag_chart, lag_legend, lag_shares
from sgpo_async.report.numbers import scientific
from sgpo_async.report.svg import Series, line_chart

AUTO, GUIDED, THIRD, FOURTH, BOUND = 1, 2, 3, 4, 5  # slots of the palette
SPARSE = 0.25  # a figure that a smaller share of steps has is drawn as single measurements


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One key of metrics.jsonl, or a/b for the entry b of key a, and so on."""

    key: str
    name: str
    colour: int = AUTO
    smooth: bool = True
    dots: bool = False
    bound: bool = False  # not measured but set: dashed


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page."""

    title: str
    says: str
    y_label: str
    curves: tuple[Curve, ...]
    share: bool = False  # the figures are shares: the axis goes from 0 to 100 %
    around_one: bool = False  # small deviations from 1 matter: the axis does not include 0
    log: bool = False  # the figures lie powers of ten apart


CHARTS = (
    Chart(
        title="Pass rate",
        says="Share of rollouts that solve their problem, alone and with the strategy. Dots: held-out problems.",
        y_label="pass rate",
        share=True,
        curves=(
            Curve(key="pass_auto", name="autonomous, training"),
            Curve(key="pass_guided", name="guided, training", colour=GUIDED),
            Curve(key="eval_pass_auto", name="autonomous, held-out", dots=True),
            Curve(key="eval_pass_guided", name="guided, held-out", colour=GUIDED, dots=True),
        ),
    ),
    Chart(
        title="Adaptive weight",
        says="Mean alpha(q) over the batch (Eq. 6): how much guidance is distilled. It falls as the policy learns.",
        y_label="mean alpha",
        curves=(Curve(key="alpha", name="mean alpha"),),
    ),
    Chart(
        title="Entropy",
        says="Of the policy on its own rollouts. A collapse to 0 ends exploration.",
        y_label="nats per token",
        curves=(Curve(key="entropy", name="entropy"),),
    ),
    Chart(
        title="Correction weights",
        says="Mean of the weights in use; 1 where behaviour and policy agree. Lag 0 shows the engines' part alone.",
        y_label="mean weight",
        around_one=True,
        curves=(
            Curve(key="correction_mean_stale", name="GRPO, stale tokens"),
            Curve(key="kl_correction_mean_stale", name="distillation, stale tokens", colour=THIRD),
            Curve(key="correction_mean_lag0", name="GRPO, lag 0", colour=GUIDED),
        ),
    ),
    Chart(
        title="Truncated corrections",
        says="Share of tokens whose weight would be another without the bound.",
        y_label="share of tokens",
        share=True,
        curves=(
            Curve(key="correction_clipped", name="GRPO"),
            Curve(key="kl_correction_clipped", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Smallest correction",
        says="The least weight of any token in the batch: how little the most outdated one still counts.",
        y_label="weight",
        curves=(
            Curve(key="correction_min", name="GRPO"),
            Curve(key="kl_correction_min", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Importance ratio",
        says="Mean of policy over behaviour probability, by the age of the tokens in versions.",
        y_label="mean ratio",
        around_one=True,
        curves=(
            Curve(key="ratio_by_lag/0", name="lag 0"),
            Curve(key="ratio_by_lag/1", name="lag 1", colour=GUIDED),
            Curve(key="ratio_by_lag/2", name="lag 2", colour=THIRD),
        ),
    ),
    Chart(
        title="Engine against learner",
        says="Mean |log pi − log mu|. At lag 0 both hold the same weights; stale tokens add what the policy has moved. "
        "Later spans follow an update in flight.",
        y_label="nats per token",
        log=True,
        curves=(
            Curve(key="mismatch_mean_lag0_first", name="lag 0, first span"),
            Curve(key="mismatch_mean_lag0_later", name="lag 0, later spans", colour=GUIDED),
            Curve(key="mismatch_mean_stale_first", name="stale, first span", colour=THIRD),
            Curve(key="mismatch_mean_stale_later", name="stale, later spans", colour=FOURTH),
            Curve(key="mismatch_bound", name="bound at lag 0", colour=BOUND, bound=True),
        ),
    ),
    Chart(
        title="Masked KL",
        says="Tokens with a divergence above delta (Eq. 5), and how much of the whole divergence they hold.",
        y_label="share",
        share=True,
        curves=(
            Curve(key="kl_masked_fraction", name="of the tokens"),
            Curve(key="kl_masked_mass", name="of the divergence", colour=THIRD),
        ),
    ),
    Chart(
        title="Guided against autonomous",
        says="Mean forward KL from the guided to the unguided distribution on distilled rollouts (Eq. 3).",
        y_label="nats per token",
        curves=(Curve(key="kl_mean", name="mean KL"),),
    ),
    Chart(
        title="Losses",
        says="The whole loss (Eq. 7) and its two terms.",
        y_label="loss",
        curves=(
            Curve(key="loss", name="whole"),
            Curve(key="grpo_loss", name="GRPO", colour=GUIDED),
            Curve(key="kd_loss", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Throughput",
        says="Tokens that all engines generate in a second.",
        y_label="tokens per second",
        curves=(Curve(key="tokens_per_s", name="generated"),),
    ),
    Chart(
        title="Idle",
        says="Share of the time that the trainer waits for a batch, and that engines have nothing to do.",
        y_label="share of the time",
        share=True,
        curves=(
            Curve(key="learner_idle", name="trainer"),
            Curve(key="engine_idle", name="engines", colour=THIRD),
        ),
    ),
    Chart(
        title="Gradient norm",
        says="Before clipping.",
        y_label="norm",
        curves=(Curve(key="grad_norm", name="gradient norm"),),
    ),
)
BENCHMARKS_AFTER = "Pass rate"  # where the benchmarks stand among them
LAG_AFTER = "Entropy"  # ... and the lag histogram


def figures(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The HTML of every chart that has data."""
    parts = []
    for chart in CHARTS:
        series = [_series(curve, lines) for curve in chart.curves]
        if any(one.points for one in series):
            parts.append(_figure(chart.title, chart.says, _draw(chart, series), _legend(series)))
        if chart.title == BENCHMARKS_AFTER:
            parts += _benchmarks(lines)
        if chart.title == LAG_AFTER and (shares := lag_shares(lines)):
            says = "How many weight versions lie between the policy that produced a token and the one it trains."
            parts.append(_figure("Lag", says, lag_chart(shares), lag_legend(shares)))
    return parts


def _benchmarks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart of all benchmarks that the run evaluates; none if it does not."""
    names = dict.fromkeys(name for line in lines for name in line.get("eval_benchmarks") or {})
    if not names:
        return []
    chart = Chart(
        title="Benchmarks",
        says="avg@k of the versions evaluated while training goes on.",
        y_label="avg@k",
        share=True,
        curves=tuple(
            Curve(key=f"eval_benchmarks/{name}/avg", name=name, colour=1 + number % BOUND, dots=True)
            for number, name in enumerate(names)
        ),
    )
    series = [_series(curve, lines) for curve in chart.curves]
    return [_figure(chart.title, chart.says, _draw(chart, series), _legend(series))]


def _series(curve: Curve, lines: Sequence[Mapping[str, Any]]) -> Series:
    found = [(line["step"], _value(line, curve.key)) for line in lines]
    points = [(step, value) for step, value in found if isinstance(value, int | float)]
    dots = curve.dots or len(points) < SPARSE * len(lines)
    smooth = curve.smooth and not (dots or curve.bound)
    return Series(name=curve.name, points=points, colour=curve.colour, smooth=smooth, dots=dots, bound=curve.bound)


def _value(line: Mapping[str, Any], key: str) -> Any:
    outer, _, inner = key.partition("/")
    value = line.get(outer)
    return _value(value, inner) if inner and isinstance(value, Mapping) else value


def _draw(chart: Chart, series: Sequence[Series]) -> str:
    if chart.share:
        return line_chart(series, y_label=chart.y_label, y_range=_share_range(series), show=_percent)
    if chart.log:
        return line_chart(series, y_label=chart.y_label, show=scientific, log=True)
    values = [y for one in series for _, y in one.points]
    near = (min(1.0, *values), max(1.0, *values)) if chart.around_one else None
    return line_chart(series, y_label=chart.y_label, y_range=near)


def _share_range(series: Sequence[Series]) -> tuple[float, float]:
    """0 to 100 %, or to a tenth where all is small."""
    return (0.0, 1.0) if max(y for one in series for _, y in one.points) > 0.1 else (0.0, 0.1)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    shown = [one for one in series if one.points]
    if len(shown) < 2:
        return []
    return [(f"c{one.colour}" + (" ring" if one.dots else " dash" if one.bound else ""), one.name) for one in shown]


def _figure(title: str, says: str, svg: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key"><i class="{css}"></i>{escape(name)}</span>' for css, name in legend)
    legend_html = f'<div class="legend">{keys}</div>' if keys else ""
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2><p>{escape(says)}</p>{legend_html}</figcaption>\n{svg}\n</figure>"
    )

"""Which curves the page shows, as a literal table, and the HTML of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sgpo_async.report.lag import lag_chart, lag_legend, lag_shares
from sgpo_async.report.svg import Series, line_chart

AUTO, GUIDED, THIRD = 1, 2, 3  # slots of the palette; a colour means the same thing on the whole page


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One key of metrics.jsonl."""

    key: str
    name: str
    colour: int = AUTO
    smooth: bool = True
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page."""

    title: str
    says: str
    y_label: str
    curves: tuple[Curve, ...]
    share: bool = False  # the figures are shares: the axis goes from 0 to 100 %


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
        says="Of stale tokens, after truncation: 1 where behaviour and policy agree.",
        y_label="weight",
        curves=(
            Curve(key="correction_mean", name="mean"),
            Curve(key="correction_min", name="smallest", colour=THIRD),
        ),
    ),
    Chart(
        title="Truncated corrections",
        says="Share of tokens whose correction stands at its bound.",
        y_label="share of tokens",
        share=True,
        curves=(Curve(key="correction_clipped", name="at the bound"),),
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
LAG_AFTER = "Entropy"  # where the lag histogram stands among them


def figures(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The HTML of every chart that has data."""
    parts = []
    for chart in CHARTS:
        series = [_series(curve, lines) for curve in chart.curves]
        if any(one.points for one in series):
            parts.append(_figure(chart.title, chart.says, _draw(chart, series), _legend(series)))
        if chart.title == LAG_AFTER and (shares := lag_shares(lines)):
            says = "How many weight versions lie between the policy that produced a token and the one it trains."
            parts.append(_figure("Lag", says, lag_chart(shares), lag_legend(shares)))
    return parts


def _series(curve: Curve, lines: Sequence[Mapping[str, Any]]) -> Series:
    points = [(line["step"], line[curve.key]) for line in lines if isinstance(line.get(curve.key), int | float)]
    smooth = curve.smooth and not curve.dots
    return Series(name=curve.name, points=points, colour=curve.colour, smooth=smooth, dots=curve.dots)


def _draw(chart: Chart, series: Sequence[Series]) -> str:
    if chart.share:
        return line_chart(series, y_label=chart.y_label, y_range=_share_range(series), show=_percent)
    return line_chart(series, y_label=chart.y_label)


def _share_range(series: Sequence[Series]) -> tuple[float, float]:
    """0 to 100 %, or to a tenth where all is small."""
    return (0.0, 1.0) if max(y for one in series for _, y in one.points) > 0.1 else (0.0, 0.1)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    shown = [one for one in series if one.points]
    if len(shown) < 2:
        return []
    return [(f"c{one.colour}" + (" ring" if one.dots else ""), one.name) for one in shown]


def _figure(title: str, says: str, svg: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key"><i class="{css}"></i>{escape(name)}</span>' for css, name in legend)
    legend_html = f'<div class="legend">{keys}</div>' if keys else ""
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2><p>{escape(says)}</p>{legend_html}</figcaption>\n{svg}\n</figure>"
    )

"""The charts of the page, as a table, and the HTML of each chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sgpo_async.metrics.names import METRICS, REST, section_of
from sgpo_async.report.lag import lag_chart, lag_legend, lag_shares
from sgpo_async.report.numbers import scientific
from sgpo_async.report.svg import Series, line_chart

GROUPS: Mapping[str, str] = {  # the sections of `metrics.names`, in the order of the page
    "eval": "Evaluation",
    "train": "Training",
    "mismatch": "Lag and mismatch",
    "system": "System",
    REST: "Metrics without a chart of their own",
}
AUTO, GUIDED, THIRD, FOURTH, BOUND = 1, 2, 3, 4, 5  # indices into the palette
SPARSE = 0.25  # a metric that a smaller share of steps has is drawn as dots


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The values of one key of metrics.jsonl; key a/b is the entry b of the object a."""

    key: str
    name: str
    colour: int = AUTO
    smooth: bool = True
    dots: bool = False
    bound: bool = False  # a configured bound, not a measurement: dashed


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page, in the section of its first curve."""

    title: str
    caption: str
    y_label: str
    curves: tuple[Curve, ...]
    share: bool = False  # the values are shares: the axis goes from 0 to 100 %
    around_one: bool = False  # the axis includes 1 but not 0, to show small deviations from 1
    log: bool = False  # logarithmic axis
    zero: str = ""  # what it means if every value is 0

    @property
    def group(self) -> str:
        """The section."""
        return section_of(self.curves[0].key)


CHARTS = (
    Chart(
        title="Pass rate",
        caption="Share of correct rollouts: of the policy alone, and with the strategy (guided). Dots: held-out.",
        y_label="pass rate",
        share=True,
        curves=(
            Curve(key="eval_pass_auto", name="alone, held-out", dots=True),
            Curve(key="eval_pass_guided", name="guided, held-out", colour=GUIDED, dots=True),
            Curve(key="pass_auto", name="alone, training"),
            Curve(key="pass_guided", name="guided, training", colour=GUIDED),
        ),
    ),
    Chart(
        title="Adaptive weight",
        caption="Mean alpha(q) over the batch (Eq. 6), the weight of distillation. It falls as the policy learns.",
        y_label="mean alpha",
        curves=(Curve(key="alpha", name="mean alpha"),),
    ),
    Chart(
        title="Entropy",
        caption="Entropy of the policy on its own rollouts. A collapse to 0 ends exploration.",
        y_label="nats per token",
        curves=(Curve(key="entropy", name="entropy"),),
    ),
    Chart(
        title="Without a signal",
        caption="Groups whose autonomous rollouts all have the same reward: the policy gradient learns nothing from "
        "them. Rollouts that max_new_tokens has cut.",
        y_label="share",
        share=True,
        curves=(
            Curve(key="uniform", name="groups of equal rewards"),
            Curve(key="cut", name="cut rollouts", colour=GUIDED),
        ),
    ),
    Chart(
        title="Correction weights",
        caption="Mean of the weights; 1 if behaviour policy and policy agree. Lag 0 shows only the engines' error.",
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
        caption="Share of tokens whose weight is limited by the bound.",
        zero="the bound limits no token's weight",
        y_label="share of tokens",
        share=True,
        curves=(
            Curve(key="correction_clipped", name="GRPO"),
            Curve(key="kl_correction_clipped", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Smallest correction",
        caption="Smallest weight of any token in the batch: how little the most outdated token contributes.",
        y_label="weight",
        curves=(
            Curve(key="correction_min", name="GRPO"),
            Curve(key="kl_correction_min", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Importance ratio",
        caption="Mean of policy probability / behaviour probability, by the lag of the tokens.",
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
        caption="Mean |log pi − log mu|. At lag 0 both use equal weights; stale tokens include the policy's change. "
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
        title="Canary",
        caption="Mean difference between the log-probabilities of engines and learner on one fixed sequence.",
        zero="engines and learner agree exactly",
        y_label="nats per token",
        log=True,
        curves=(
            Curve(key="canary_mean", name="mean over engines"),
            Curve(key="canary_max", name="largest", colour=GUIDED),
        ),
    ),
    Chart(
        title="Masked KL",
        caption="Tokens with a divergence above delta (Eq. 5), and their share of the total divergence.",
        zero="no token's divergence exceeds delta",
        y_label="share",
        share=True,
        curves=(
            Curve(key="kl_masked_fraction", name="of the tokens"),
            Curve(key="kl_masked_mass", name="of the divergence", colour=THIRD),
        ),
    ),
    Chart(
        title="Guided against unguided",
        caption="Mean forward KL from the guided to the unguided distribution on distilled rollouts (Eq. 3).",
        y_label="nats per token",
        curves=(Curve(key="kl_mean", name="mean KL"),),
    ),
    Chart(
        title="Losses",
        caption="The total loss (Eq. 7) and its two terms.",
        y_label="loss",
        curves=(
            Curve(key="loss", name="total"),
            Curve(key="grpo_loss", name="GRPO", colour=GUIDED),
            Curve(key="kd_loss", name="distillation", colour=THIRD),
        ),
    ),
    Chart(
        title="Throughput",
        caption="Tokens that all engines together generate per second.",
        y_label="tokens per second",
        curves=(Curve(key="tokens_per_s", name="generated"),),
    ),
    Chart(
        title="Idle",
        caption="Share of the time in which the trainer waits, or an engine has no request, by cause. "
        "Engines: the mean since the hub began.",
        y_label="share of the time",
        share=True,
        curves=(
            Curve(key="learner_idle", name="trainer, for a batch"),
            Curve(key="learner_waits/publication", name="trainer, for a publication", colour=GUIDED),
            Curve(key="learner_waits/checkpoint", name="trainer, for a checkpoint", colour=BOUND),
            Curve(key="engine_idle", name="engines, in all", colour=THIRD),
            Curve(key="engine_waits/weights", name="engines, for weights", colour=FOURTH),
        ),
    ),
    Chart(
        title="Gradient norm",
        caption="Norm of the gradient before clipping.",
        y_label="norm",
        curves=(Curve(key="grad_norm", name="gradient norm"),),
    ),
)
BENCHMARKS_AFTER = "Pass rate"  # the benchmarks follow this chart
LAG_AFTER = "Entropy"  # the lag histogram follows this chart
SENTENCE = '<p class="without">'  # the beginning of what stands in the place of a chart of zeros


def figures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the group and the HTML of every chart that has data, then a sentence for each whose values are all 0."""
    parts: list[tuple[str, str]] = []
    for chart in CHARTS:
        parts += _chart(chart, lines)
        if chart.title == BENCHMARKS_AFTER:
            parts += _benchmarks(lines)
        if chart.title == LAG_AFTER and (shares := lag_shares(lines)):
            caption = (
                "Number of weight versions between the policy that generated a token and the policy trained on it."
            )
            figure = _figure("Lag", caption, lag_chart(shares), lag_legend(shares))
            parts.append((section_of("lag_histogram"), figure))
    return sorted(parts, key=lambda part: part[1].startswith(SENTENCE))


def other_figures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return a chart of every number in these lines that has no place in CHARTS."""
    drawn = {curve.key for chart in CHARTS for curve in chart.curves} | {"step"}
    keys = sorted({key for line in lines for key, value in line.items() if isinstance(value, int | float)} - drawn)
    parts = [part for key in keys for part in _chart(_chart_of(key), lines)]
    return sorted(parts, key=lambda part: part[1].startswith(SENTENCE))


def _chart_of(key: str) -> Chart:
    """A chart of one key, with what the table of names says of it."""
    about = METRICS.get(key)
    unit = about.unit if about and about.unit != "1" else key
    return Chart(title=key, caption=about.meaning if about else "", y_label=unit, curves=(Curve(key=key, name=key),))


def _chart(chart: Chart, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    series = [_series(curve, lines) for curve in chart.curves]
    measured = [y for curve in series if not curve.bound for _, y in curve.points]
    if not measured:
        return []
    if not any(measured):
        means = f": {chart.zero}" if chart.zero else ""
        return [(chart.group, f"{SENTENCE}<b>{escape(chart.title)}</b> 0 in every step{escape(means)}.</p>")]
    return [(chart.group, _figure(chart.title, chart.caption, _draw(chart, series), _legend(series)))]


def _benchmarks(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return one chart of all benchmarks that the run evaluates, [] if it evaluates none."""
    names = dict.fromkeys(name for line in lines for name in line.get("eval_benchmarks") or {})
    if not names:
        return []
    chart = Chart(
        title="Benchmarks",
        caption="avg@k of the versions that were evaluated during training.",
        y_label="avg@k",
        share=True,
        curves=tuple(
            Curve(key=f"eval_benchmarks/{name}/avg", name=name, colour=1 + number % BOUND, dots=True)
            for number, name in enumerate(names)
        ),
    )
    return _chart(chart, lines)


def _series(curve: Curve, lines: Sequence[Mapping[str, Any]]) -> Series:
    values = [(line["step"], _value(line, curve.key)) for line in lines]
    points = [(step, value) for step, value in values if isinstance(value, int | float)]
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
    values = [y for curve in series for _, y in curve.points]
    y_range = (min(1.0, *values), max(1.0, *values)) if chart.around_one else None
    return line_chart(series, y_label=chart.y_label, y_range=y_range)


def _share_range(series: Sequence[Series]) -> tuple[float, float]:
    """Return 0 to 100 %, or to the smallest power of ten down to 0.01 % that is above all values."""
    most = max(y for curve in series for _, y in curve.points)
    return 0.0, next((end for end in (1e-4, 1e-3, 0.01, 0.1) if most <= end), 1.0)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Return (CSS class, name) of each curve; [] for a single curve, which needs no legend."""
    shown = [curve for curve in series if curve.points]
    if len(shown) < 2:
        return []
    return [(_legend_class(curve), curve.name) for curve in shown]


def _legend_class(series: Series) -> str:
    marker = " ring" if series.dots else " dash" if series.bound else ""
    return f"c{series.colour}{marker}"


def _figure(title: str, caption: str, svg: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key"><i class="{css}"></i>{escape(name)}</span>' for css, name in legend)
    legend_html = f'<div class="legend">{keys}</div>' if keys else ""
    head = f"<figcaption><h2>{escape(title)}</h2><p>{escape(caption)}</p>{legend_html}</figcaption>"
    return f"<figure>{head}\n{svg}\n</figure>"

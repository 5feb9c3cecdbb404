"""Write runs/NAME/report.html: one file without scripts or network access, for light and dark colour schemes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from sgpo_async.config import Run, by_key_path, to_plain
from sgpo_async.errors import DataError
from sgpo_async.files import write_whole
from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.metrics.samples import read_samples
from sgpo_async.report.advisories import advice_after
from sgpo_async.report.charts import GROUPS, figures
from sgpo_async.report.closing import canary_alarm, mismatch_alarm, summarise, summary_rows
from sgpo_async.report.completions import completions
from sgpo_async.report.document import document, with_code
from sgpo_async.report.numbers import clock, number, percent


def write_report(folder: str | Path) -> Path:
    """Write report.html into the run's folder and return its path.

    Reads metrics.jsonl, samples.jsonl, summary.json and config.yaml; only metrics.jsonl must exist. Raises DataError if
    it does not exist or a file cannot be read, SgpoError if the page cannot be written.
    """
    folder = Path(folder)
    lines = read_metrics(folder)
    if not lines:
        raise DataError(
            f"{folder}: contains no metrics.jsonl with a finished step; give the folder of a run, e.g. runs/demo"
        )
    summary = summarise(lines) | read_summary(folder)
    path = folder / "report.html"
    config = read_config(folder / "config.yaml")
    samples = completions(read_samples(folder))
    write_whole(path, _page(folder.resolve().name, lines, summary, config, samples))
    return path


def _page(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    samples: str,
) -> str:
    changed = changed_settings(config)
    body = [
        f"<header><h1>{escape(name)}</h1><p>{escape(_subtitle(summary, config))}</p></header>",
        *(_alarm(*row) for row in mismatch_alarm(summary["mismatch"])),
        *(_alarm(*row) for row in canary_alarm(summary["canary"])),
        *(_advice(*row) for row in advice_after(lines, config)),
        f'<div class="tiles">{"".join(_tile(*tile) for tile in _tiles(summary))}</div>',
        *charts_by_group(figures(lines)),
        samples,
        f"<section><h2>Final metrics</h2>{_table(summary_rows(summary))}</section>",
    ]
    if config:
        table = _table(changed) if changed else "<p>All settings have their default values.</p>"
        whole = escape(yaml.safe_dump(dict(config), sort_keys=False))
        details = f"<details><summary>The whole configuration</summary><pre>{whole}</pre></details>"
        body.append(f"<section><h2>Settings that differ from the defaults</h2>{table}{details}</section>")
    return document(name, body)


def charts_by_group(parts: Sequence[tuple[str, str]]) -> list[str]:
    """The HTML of each group that has charts, with its heading; `parts` as `figures` returns them."""
    by_group = {name: "".join(html for group, html in parts if group == name) for name in GROUPS}
    return [
        f'<h2 class="group">{escape(GROUPS[name])}</h2><div class="charts">{html}</div>'
        for name, html in by_group.items()
        if html
    ]


def _subtitle(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    objective = summary.get("objective") or config.get("algorithm", {}).get("objective", "")
    model = config.get("model", {}).get("path", "")
    ranks, actors = summary.get("world_size"), summary.get("actors")
    parts = [objective.upper(), model]
    parts += [f"{ranks} learner ranks"] if ranks else []
    parts += [f"{actors} actor" + ("s" if actors > 1 else "")] if actors else []
    ended = "interrupted after " * bool(summary.get("interrupted"))
    parts += [f"{ended}{number(summary.get('steps'))} steps in {clock(summary.get('wall_s'))}"]
    return " · ".join(part for part in parts if part)


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    get = summary.get
    first, last = percent(get("pass_auto_first")), percent(get("pass_auto_last"))
    rate = (get("tokens_generated") or 0) / get("wall_s", 0) if get("wall_s") else None
    return [
        (f"{first} → {last}", "held-out pass rate, alone"),
        (percent(get("pass_guided_last")), "held-out pass rate, guided"),
        (number(get("lag_mean")), f"mean lag (at most {number(get('lag_max'))}) in versions"),
        (number(rate), "tokens generated per second"),
        (percent(get("learner_idle")), "trainer idle"),
        (percent(get("engine_idle")), "engines idle"),
    ]


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _alarm(name: str, text: str) -> str:
    return f'<p class="alarm"><b>{escape(name)}</b> {escape(text)}</p>'


def _advice(what: str, remedy: str) -> str:
    return f'<p class="alarm advice"><b>{escape(what)}:</b> {with_code(remedy)}</p>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration without checking it, so that a run of an older schema can still be reported."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not YAML ({error})".splitlines()[0]) from None
    return config if isinstance(config, dict) else {}


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key path, value and default) of each setting that differs from its default."""
    defaults = dict(by_key_path(to_plain(Run())))
    missing = object()
    rows = []
    for key, value in by_key_path(config):
        default = defaults.get(key, missing)
        if value != default:
            rows.append((key, f"{value}" if default in (missing, "") else f"{value} (default {default})"))
    return rows

"""docs/metrics.md, from the table of names: python -m sgpo_async.metrics.page > docs/metrics.md"""

from __future__ import annotations

from collections.abc import Iterable

from sgpo_async.metrics.names import SECTIONS, STEPS, WARM_UP, Metric


def page() -> str:
    """The text of docs/metrics.md."""
    head = """# Metrics

<!-- Written by: python -m sgpo_async.metrics.page > docs/metrics.md -->

Every key of `runs/NAME/metrics.jsonl`, which has one line per optimiser step. The name is that in TensorBoard, W&B and
MLflow ([trackers.md](trackers.md)); an object's entries follow it after a slash, such as `system/ledger/dropped/stale`.
A key is null, and has no point in a tracker, where nothing was measured. Shares are in [0, 1].
"""
    parts = [head]
    for section, about in SECTIONS.items():
        own = [metric for metric in STEPS if metric.section == section]
        parts.append(f"## {section}: {about}\n\n{_table(own)}")
    parts.append(f"## Supervised warm-up (`sgpo-async sft`)\n\n{_table(WARM_UP)}")
    return "\n".join(parts)


def _table(metrics: Iterable[Metric]) -> str:
    rows = [(f"`{metric.key}`", f"`{metric.name}`", metric.unit, metric.meaning) for metric in metrics]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(["| key | name | unit | meaning |", "|---|---|---|---|", *(f"| {line} |" for line in lines), ""])


if __name__ == "__main__":
    print(page(), end="")

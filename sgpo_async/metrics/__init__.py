"""Numbers of a run on disk: metrics.jsonl, TensorBoard events, summary.json; writing and reading them."""

from sgpo_async.metrics.reader import MetricsTail, read_metrics, read_summary
from sgpo_async.metrics.writer import MetricsWriter

__all__ = ["MetricsTail", "MetricsWriter", "read_metrics", "read_summary"]

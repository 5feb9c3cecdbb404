"""Write and read the metrics of a run: metrics.jsonl, TensorBoard events, summary.json."""

from sgpo_async.metrics.reader import MetricsTail, read_metrics, read_summary
from sgpo_async.metrics.samples import SamplesWriter, read_samples
from sgpo_async.metrics.writer import MetricsWriter

__all__ = ["MetricsTail", "MetricsWriter", "SamplesWriter", "read_metrics", "read_samples", "read_summary"]

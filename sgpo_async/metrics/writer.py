"""Write the metrics of a run; the learner's rank 0 does this during training.

runs/NAME/metrics.jsonl    one line per step, on disk as soon as the step ends
runs/NAME/summary.json     the final metrics, replaced atomically
runs/NAME/tensorboard/ ... trackers, which follow metrics.jsonl (`sgpo_async.metrics.trackers`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_async.files import JsonLinesWriter, to_json, write_whole
from sgpo_async.metrics.reader import METRICS, SUMMARY, read_metrics
from sgpo_async.metrics.trackers import Trackers


class MetricsWriter:
    """Writes the metrics of one run below `folder`, and starts its trackers.

    `resume_from` is the step of the checkpoint that the run continues from: lines of later steps are deleted, because
    the resumed run writes them again. With 0 the run starts from the beginning and all earlier metrics are deleted.
    Every method raises SgpoError (one line: file, reason, remedy) if the disk is full or the folder is not writable; a
    tracker that fails is only logged.
    """

    def __init__(self, folder: str | Path, *, resume_from: int = 0, trackers: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        path = self.folder / METRICS
        kept = [line for line in read_metrics(self.folder) if line["step"] <= resume_from] if resume_from else []
        write_whole(path, "".join(to_json(line) + "\n" for line in kept))
        (self.folder / SUMMARY).unlink(missing_ok=True)  # of the end of an earlier run or attempt
        self._lines = JsonLinesWriter(path)
        self._finished = False
        self._trackers = Trackers(trackers, self.folder, resumes=resume_from > 0)

    def step(self, values: Mapping[str, Any]) -> None:
        """Write the metrics of one optimiser step; `values` must contain `step`."""
        self._lines.append(values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace summary.json: the run has finished."""
        write_whole(self.folder / SUMMARY, to_json(values, indent=2) + "\n")
        self._finished = True

    def close(self) -> None:
        """Close the file, and have the trackers write what is left; samples.jsonl must be complete, too."""
        self._trackers.end(finished=self._finished)
        self._lines.close()

    def wait(self) -> None:
        """After `close`, wait until the trackers have everything, or until their deadline."""
        self._trackers.wait()

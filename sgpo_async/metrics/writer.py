"""Write the metrics of a run; the learner's rank 0 does this during training.

runs/NAME/metrics.jsonl    one line per step, on disk as soon as the step ends
runs/NAME/tensorboard/     the same metrics as scalars and histograms
runs/NAME/summary.json     the final metrics, replaced atomically
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgpo_async.files import JsonLinesWriter, reporting_write_errors, to_json, write_whole
from sgpo_async.metrics.reader import METRICS, SUMMARY, read_metrics

TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes the metrics of one run below `folder`.

    `resume_from` is the step of the checkpoint that the run continues from: lines of later steps are deleted, because
    the resumed run writes them again. With 0 the run starts from the beginning and all earlier metrics are deleted.
    Every method raises SgpoError (one line: file, reason, remedy) if the disk is full or the folder is not writable.
    """

    def __init__(self, folder: str | Path, *, resume_from: int = 0) -> None:
        self.folder = Path(folder)
        self._path = self.folder / METRICS
        kept = [line for line in read_metrics(self.folder) if line["step"] <= resume_from] if resume_from else []
        write_whole(self._path, "".join(to_json(line) + "\n" for line in kept))
        (self.folder / SUMMARY).unlink(missing_ok=True)  # of the end of an earlier run or attempt
        self._lines = JsonLinesWriter(self._path)
        with reporting_write_errors(self._path):
            self._board = self._open_board(resume_from)

    def step(self, values: Mapping[str, Any]) -> None:
        """Write the metrics of one optimiser step; `values` must contain `step`."""
        self._lines.append(values)
        with reporting_write_errors(self._path):
            self._to_board(values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_whole(self.folder / SUMMARY, to_json(values) + "\n")

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        with reporting_write_errors(self._path):
            self._board.close()

    def _open_board(self, resume_from: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / TENSORBOARD
        if not resume_from:
            shutil.rmtree(folder, ignore_errors=True)
        return SummaryWriter(str(folder), purge_step=resume_from + 1 if resume_from else None, flush_secs=10)

    def _to_board(self, values: Mapping[str, Any]) -> None:
        step = int(values["step"])
        for key, value in values.items():
            if key == "step":
                continue
            if key.endswith("_histogram"):
                self._add_histogram(key, value, step)
            elif isinstance(value, Mapping):
                for name, number in _scalars(value, f"{key}/"):
                    self._board.add_scalar(name, number, step)
            elif isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def _add_histogram(self, key: str, counts: Mapping[Any, Any], step: int) -> None:
        """Add a histogram; `counts` maps an integer (a lag) to the number of tokens with it."""
        if not counts:
            return
        pairs = sorted((int(value), float(count)) for value, count in counts.items())
        self._board.add_histogram_raw(
            key,
            min=pairs[0][0],
            max=pairs[-1][0],
            num=sum(count for _, count in pairs),
            sum=sum(value * count for value, count in pairs),
            sum_squares=sum(value * value * count for value, count in pairs),
            bucket_limits=[value + 0.5 for value, _ in pairs],
            bucket_counts=[count for _, count in pairs],
            global_step=step,
        )


def _scalars(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Flatten nested counts to (name, number) pairs, with names like ledger/dropped/stale."""
    flat: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat.append((f"{prefix}{key}", value))
    return flat

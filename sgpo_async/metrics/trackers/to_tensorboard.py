"""TensorBoard: runs/NAME/tensorboard/, one file of events, written anew whenever the run is started or resumed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

from sgpo_async.metrics.trackers.base import COLUMNS, About, State

TENSORBOARD = "tensorboard"  # below the run's folder
TEXT = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
STRING = 7  # DT_STRING


class TensorBoard:
    """The file of events. It begins empty, so that a resumed run has no step twice."""

    note = ""

    def __init__(self, about: About) -> None:
        self.state = State(failures=about.state.failures)
        folder = about.folder / TENSORBOARD
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        now = int(time.time())
        path = folder / f"events.out.tfevents.{now:010}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # A TensorBoard that shows the run already forgets what it has read.
        self._write(Event(session_log=SessionLog(status=SessionLog.START)))
        if about.config:
            self._text(
                "config", "    " + yaml.safe_dump(dict(about.config), sort_keys=False).replace("\n", "\n    "), 0
            )
        self._records.flush()

    def step(self, step: int, values: Mapping[str, float], counts: Mapping[str, Mapping[int, float]]) -> None:
        """One event with all scalars, then the histograms."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        drawn = [Summary.Value(tag=name, histo=_histogram(count)) for name, count in counts.items()]
        self._write(Event(step=step, summary=Summary(value=[*scalars, *drawn])))
        self._records.flush()

    def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """Markdown, in which the texts are code: nothing in them is markup."""
        parts = []
        for row in rows:
            cells = dict(zip(COLUMNS, row, strict=True))
            facts = ", ".join(f"{name} {cells[name]}" for name in COLUMNS if name not in ("problem", "completion"))
            parts += [f"**{facts}**", _code(cells["problem"]), _code(cells["completion"])]
        self._text("train/samples", "\n\n".join(parts), step)

    def summary(self, values: Mapping[str, float]) -> None:
        """A table."""
        rows = [f"| {name} | {value:g} |" for name, value in values.items()]
        self._text("summary", "\n".join(["| final metric | value |", "|---|---|", *rows]), self.state.step)

    def close(self, *, finished: bool) -> None:
        """Close the file; a resumed run begins another one."""
        del finished
        self._records.flush()
        self._file.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=STRING, string_val=[text.encode()], tensor_shape=shape)
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=TEXT, tensor=tensor)
        self._write(Event(step=step, summary=Summary(value=[value])))
        self._records.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def open_run(about: About) -> TensorBoard:
    """Begin the file of events."""
    return TensorBoard(about)


def _code(text: object) -> str:
    """A block of code, which is indented."""
    return "    " + str(text).replace("\n", "\n    ")


def _histogram(counts: Mapping[int, float]) -> HistogramProto:
    """One bucket around each integer."""
    values = sorted(counts)
    return HistogramProto(
        min=values[0],
        max=values[-1],
        num=sum(counts.values()),
        sum=sum(value * count for value, count in counts.items()),
        sum_squares=sum(value * value * count for value, count in counts.items()),
        bucket_limit=[value + 0.5 for value in values],
        bucket=[counts[value] for value in values],
    )

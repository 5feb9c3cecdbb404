"""The folder of one evaluation.

settings.json       what it depends on; a call with other settings is refused
BENCHMARK.jsonl     one line for each problem, on disk as soon as its last sample is judged
summary.json        the figures, once every problem has its line

A call that was killed leaves whole lines and perhaps a part of one, which the next call removes; it samples what has no
line. One process at a time writes.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sgpo_async.errors import ConfigError, DataError
from sgpo_async.evaluation.evaluation_plan import differences
from sgpo_async.files import JsonLinesReader, JsonLinesWriter, reporting_write_errors, write_whole
from sgpo_async.metrics.problems import ProblemResult

SETTINGS, SUMMARY = "settings.json", "summary.json"


class Results:
    """Reads and writes one folder. Raises SgpoError if it cannot be written, DataError if it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, JsonLinesWriter] = {}

    @contextmanager
    def writing(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Claim the folder; within this context `add` may be called.

        Raises ConfigError if it holds an evaluation with other settings, or another process writes it.
        """
        path = self.folder / SETTINGS
        if path.exists() and (other := differences(settings, self.settings())):
            raise ConfigError(f"{self.folder}: holds another evaluation ({other[0]} there); choose another --out")
        with ExitStack() as stack:
            if not path.exists():
                write_whole(path, json.dumps(settings, indent=2) + "\n")
            with reporting_write_errors(path):
                lock = stack.enter_context(path.open("a"))
                names = settings["benchmarks"]
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.folder}: another process evaluates here; choose another --out") from None
            for name in names:
                self._files[name] = JsonLinesWriter(self._path(name))
                stack.callback(self._files[name].close)
            try:
                yield
            finally:
                self._files = {}

    def add(self, benchmark: str, result: ProblemResult) -> None:
        """Append the result of one problem."""
        self._files[benchmark].append(asdict(result))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: the evaluation is complete."""
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def settings(self) -> dict[str, Any]:
        """The settings of the evaluation in this folder."""
        return _read_json(self.folder / SETTINGS)

    def summary(self) -> dict[str, Any]:
        """The summary. Raises DataError if the evaluation is not complete."""
        return _read_json(self.folder / SUMMARY)

    def problems(self, benchmark: str) -> list[ProblemResult]:
        """The problems that have a whole line, in the order in which they were completed."""
        lines = JsonLinesReader(self._path(benchmark)).poll()
        return [self._checked(benchmark, number, values) for number, values in lines]

    def _checked(self, benchmark: str, number: int, values: Any) -> ProblemResult:
        names = {field.name for field in fields(ProblemResult)}
        try:
            return ProblemResult(**{name: values[name] for name in names})
        except (TypeError, KeyError) as error:
            where = f"{self._path(benchmark)}:{number}"
            raise DataError(f"{where}: is no result of a problem ({error!r}); remove the line") from None

    def _path(self, benchmark: str) -> Path:
        return self.folder / f"{benchmark}.jsonl"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "name the folder of an evaluation that is complete"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    return content

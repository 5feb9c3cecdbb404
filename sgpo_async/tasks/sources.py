"""Opens a problem source by its kind."""

from __future__ import annotations

from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource


def open_source(kind: str, *, path: str, held_out: int, seed: int) -> ProblemSource:
    """The source "cues" or "file" (at `path`), with `held_out` problems set aside for evaluation."""
    if kind == "cues":
        return CuesSource(seed=seed, held_out=held_out)
    assert kind == "file", kind
    return FileSource(path, held_out=held_out, seed=seed)

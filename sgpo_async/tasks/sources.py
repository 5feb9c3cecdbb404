"""Opens a problem source by its kind."""

from __future__ import annotations

from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource

VERIFIER_OF_SOURCE = {"cues": CuesSource.verifier, "file": FileSource.verifier}
"""The verifier of each kind, for actors, which see single problems and never open the source."""


def open_source(kind: str, *, path: str | None, held_out: float, seed: int) -> ProblemSource:
    """The source "cues" (`held_out` problems) or "file" (`held_out` as a fraction of those at `path`)."""
    if kind == "cues":
        return CuesSource(seed=seed, held_out=int(held_out))
    if kind != "file":
        raise DataError(f"problem source: {kind!r} is neither 'cues' nor 'file'")
    if path is None:
        raise DataError("problem source: 'file' needs a path")
    if not 0 <= held_out < 1:
        raise DataError(f"problem source: held_out of 'file' is a fraction from 0 to below 1, not {held_out}")
    return FileSource(path, held_out=held_out, seed=seed)

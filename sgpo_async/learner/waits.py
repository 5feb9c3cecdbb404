"""For what a rank waits during a step: the idle time of the trainer, by cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Cause = Literal["batch", "publication", "checkpoint"]
CAUSES: tuple[Cause, ...] = ("batch", "publication", "checkpoint")


class Waits:
    """Seconds of the present step by cause: the hub's batch, the store or the copy of a version, the disk or a copy."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the earlier steps."""
        self.seconds: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)

    @contextmanager
    def on(self, cause: Cause) -> Iterator[None]:
        """Count the time in this context."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[cause] += time.monotonic() - began

    def shares(self, wall_s: float) -> dict[str, float]:
        """The share of each cause in a step of `wall_s` seconds."""
        return {cause: seconds / wall_s for cause, seconds in self.seconds.items()}

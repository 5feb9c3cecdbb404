"""Waits whose deadline counts the time without progress, for work of unknown size."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

LOOK_S = 1.0  # between two looks at the progress

Result = TypeVar("Result")


def result_while_moving(future: Future[Result], progress: Callable[[], int], limit_s: float) -> Result:
    """Wait for the result of `future`. Raises TimeoutError when `progress()` has not changed for `limit_s` seconds."""
    seen, moved_at = progress(), time.monotonic()
    while not wait([future], timeout=min(LOOK_S, limit_s)).done:
        now = progress()
        if now != seen:
            seen, moved_at = now, time.monotonic()
        elif time.monotonic() - moved_at >= limit_s:
            raise TimeoutError
    return future.result()

"""In place of a weight sender: the folder into which the hub copies the weights (`weights.folder`).

It has the part of the interface of `session.rpc_world.RpcWorld` that a weight receiver needs to pull versions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from sgpo_async.errors import SessionError, Superseded, WeightsError
from sgpo_async.session import calls
from sgpo_async.session.pull import IN_FLIGHT
from sgpo_async.session.settings import Deadlines
from sgpo_async.weights.folder import WeightFolder

LOOK_S = 1.0  # between two looks for a newer version


class FolderWorld:
    """Reads from the folder at `url`; announces its versions to this process itself."""

    def __init__(self, url: str, deadlines: Deadlines) -> None:
        self._folder, self._deadlines = WeightFolder(url), deadlines
        self._workers = ThreadPoolExecutor(IN_FLIGHT, "read")
        self._announced: int | None = None
        self._look: Future[int | None] | None = None  # the read of `newest` that is in progress: it may hang
        self._looked_at = time.monotonic()
        self._silent_since = 0.0  # when the first look began after the last one that succeeded; 0: there is none
        self._reason = f"hub.weight_folder: {url} did not answer within {deadlines.silence_s:g} s"

    def begin(self, function: Callable[..., Any], *args: Any) -> FolderCall:
        """Start to read what `calls.manifest` or `calls.bucket` would return."""
        reads: dict[Callable[..., Any], Callable[..., Any]] = {
            calls.manifest: self._manifest,
            calls.bucket: self._bucket,
        }
        return FolderCall(self._workers.submit(reads[function], *args), self._deadlines.file_s)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Read, and wait for the result. Raises SessionError."""
        return self.begin(function, *args).wait()

    def check(self) -> None:
        """Look for a newer version now and then. Raises SessionError if the folder could not be read for too long."""
        now = time.monotonic()
        if self._look is None:
            if now - self._looked_at >= LOOK_S:
                self._look, self._looked_at = self._workers.submit(self._folder.newest), now
                self._silent_since = self._silent_since or now
        elif self._look.done():
            look, self._look = self._look, None
            try:
                self._announce(look.result())
            except WeightsError as error:
                self._reason = str(error)
            else:
                self._silent_since = 0.0
        if self._silent_since and now - self._silent_since > self._deadlines.silence_s:
            raise SessionError(self._reason)

    def _announce(self, newest: int | None) -> None:
        if newest is not None and newest != self._announced:
            self._announced = newest
            calls.announce(newest)

    def _manifest(self) -> bytes | None:
        newest = self._folder.newest()
        return None if newest is None else self._folder.manifest(newest)

    def _bucket(self, version: int, index: int, base: int | None) -> tuple[torch.Tensor, bool] | str:
        try:
            data, is_delta = self._folder.bucket(version, index, base)
        except Superseded:
            return calls.SUPERSEDED
        return torch.frombuffer(bytearray(data), dtype=torch.uint8), is_delta


class FolderCall:
    """One read that is in progress."""

    def __init__(self, future: Future[Any], seconds: float) -> None:
        self._future, self._seconds = future, seconds

    def wait(self) -> Any:
        """Return the result. Raises SessionError if the folder cannot be read, or not in time."""
        try:
            return self._future.result(self._seconds)
        except Superseded:
            return None
        except WeightsError as error:
            raise SessionError(str(error)) from error
        except TimeoutError:
            raise SessionError(f"hub.weight_folder: a file was not read within {self._seconds:g} s") from None

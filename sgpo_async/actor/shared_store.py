"""The weights of another actor on this machine: its store, which this actor reads. No process and no copy."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.session.receiver_process import ReceiverDown, ReceiverEvent, VersionReceived, VersionRejected
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.reader import StoreReader

STORE = re.compile(r"/proc/\d+/fd/\d+")  # as `weights.store_file` names it; only processes of its user can open it


class SharedStore:
    """Follows the store at `path`; stands where an actor has a `WeightReceiver`.

    Attributes:
        could_read: whether the store was there, and of this user, when it was looked at.
    """

    def __init__(self, path: str) -> None:
        self._path, self._reader = path, StoreReader(path)
        self.could_read = False
        self._newest = -1
        self._down = False

    def poll(self) -> list[ReceiverEvent]:
        """Return what has happened since the last call; after ReceiverDown nothing more."""
        if self._down:
            return []
        if not STORE.fullmatch(self._path):  # another actor has named it: it must not make this one open any file
            self._down = True
            return [ReceiverDown(f"the weight store of another actor must be at /proc/PID/fd/N, got {self._path!r}")]
        if not (Path(self._path).is_file() and os.access(self._path, os.R_OK)):  # to open a pipe could block
            self._down = True
            return [ReceiverDown(f"the weight store {self._path} of another actor is gone, or of another user")]
        self.could_read = True
        version = self._reader.version()
        if version is None or version <= self._newest:
            return []
        try:
            manifest = self._reader.manifest()
        except Superseded:
            return []  # the newer version is seen by the next call
        except WeightsError as error:
            self._newest = version
            return [VersionRejected(version, str(error))]
        assert manifest is not None
        self._newest = manifest.version
        return [self._received(manifest)]

    def _received(self, manifest: Manifest) -> VersionReceived:
        return VersionReceived(
            version=manifest.version,
            path=self._path,
            digest=manifest.digest,
            nbytes=manifest.nbytes,
            received=0,
            seconds=0.0,
            published_at=manifest.published_at,
        )

    def stop(self) -> None:
        """Close the store."""
        self._down = True
        self._reader.close()

"""The weight uploader (child of the hub): copies each version of the learner's store into the run's weight folder.

Run as `python -m sgpo_async.session.uploader SETTINGS`.
"""

from __future__ import annotations

import time
from typing import NoReturn

from sgpo_async.errors import Superseded
from sgpo_async.session.child_side import ChildSide, run_child
from sgpo_async.session.settings import Settings
from sgpo_async.weights.folder import WeightFolder
from sgpo_async.weights.reader import StoreReader

_TICK_S = 0.1


def run(settings: Settings, child: ChildSide) -> NoReturn:
    """Copy versions until an error. If they come faster than they can be copied, skip those in between."""
    with child.phase(f"open {settings.folder}", settings.deadlines.start_s):
        folder, store = WeightFolder(settings.folder), StoreReader(settings.store)
        done = _whole_version(folder, store)
    while True:
        version = store.version()
        if version is None or version == done:
            time.sleep(_TICK_S)
            continue
        began = time.monotonic()
        if not _upload(folder, store, version, settings, child):
            continue
        done = version
        child.emit("uploaded", version=version, seconds=time.monotonic() - began)


def _whole_version(folder: WeightFolder, store: StoreReader) -> int:
    """The newest version of the folder, if the store does not hold other content under its number; else -1."""
    newest = folder.newest()
    if newest is None:
        return -1
    try:
        return newest if store.manifest_of(newest).to_bytes() == folder.manifest(newest) else -1
    except Superseded:
        return newest


def _upload(folder: WeightFolder, store: StoreReader, version: int, settings: Settings, child: ChildSide) -> bool:
    """Copy a version; return False if the store gives it up. Each bucket has a deadline: a filesystem may hang."""
    buckets = folder.upload(store, version)
    while True:
        with child.phase(f"copy version {version} to {settings.folder}", settings.deadlines.file_s):
            try:
                if next(buckets, None) is None:
                    return True
            except Superseded:
                return False


if __name__ == "__main__":
    run_child("weight uploader", run)

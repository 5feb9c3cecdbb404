"""The weight uploader (child of the hub): copies each version of the learner's store into `hub.weight_folder`.

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
        done = -1 if (newest := folder.newest()) is None else newest
        if (here := store.version()) is not None and here < done:
            done = -1  # the folder is of another run
    while True:
        version = store.version()
        if version is None or version == done:
            time.sleep(_TICK_S)
            continue
        try:
            began = time.monotonic()
            folder.upload(store, version)
        except Superseded:
            continue
        done = version
        child.emit("uploaded", version=version, seconds=time.monotonic() - began)


if __name__ == "__main__":
    run_child("weight uploader", run)

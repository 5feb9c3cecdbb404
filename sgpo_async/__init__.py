"""Asynchronous actor-learner post-training by Strategy-Guided Policy Optimization (SGPO).

    from sgpo_async import evaluate, load_config, train

    run = load_config("builtin:demo", "steps=20")
    print(train(run).summary["pass_auto_last"])

`sgpo_async.api` has these functions. They are imported when they are first used, so that importing a part of this
package stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpo_async.api import EvaluationResult, TrainResult, evaluate, load_config, train

__all__ = ["EvaluationResult", "TrainResult", "__version__", "evaluate", "load_config", "train"]
__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("sgpo_async.api"), name)

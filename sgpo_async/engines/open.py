"""Creates the engine that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from sgpo_async.config import Run
from sgpo_async.engines import EmbeddedEngine
from sgpo_async.engines.base import Engine
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.weights import digest


def open_engine(
    run: Run, folder: str, *, logs: str = "", name: str = "sglang", stopping: Callable[[], bool] = lambda: False
) -> Engine:
    """Create and start the engine of `run` for the model in `folder`; it serves requests after its first load.

    `logs` and `name` are passed to `SglangEngine`, whose start ends early when `stopping()` is true. Raises
    EngineError, DataError, DeadlineExceeded.
    """
    if run.engine.kind == "sglang":
        truncated = run.rollout.is_truncated
        servers = SglangEngine(
            folder, run.engine, dtype=run.model.dtype, digest=digest, truncated=truncated, logs=logs, name=name
        )
        servers.start(stopping)
        return servers
    return open_embedded(run, folder)


def open_embedded(run: Run, folder: str) -> EmbeddedEngine:
    """The embedded engine for the model in `folder`, whatever `engine.kind` is. Raises EngineError, DataError."""
    return EmbeddedEngine.from_pretrained(
        folder,
        digest=digest,
        slots=run.engine.slots,
        device=run.engine.device,
        dtype=run.model.dtype,
        deterministic=run.engine.deterministic,
    )

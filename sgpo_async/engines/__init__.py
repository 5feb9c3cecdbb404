"""Inference engines behind one Protocol: the embedded one runs a transformers model in the actor's process."""

from sgpo_async.engines.base import Engine, EngineLoad, Failed, Generate, Generated, Score, Scored, Weights
from sgpo_async.engines.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine", "Engine", "EngineLoad", "Failed", "Generate", "Generated", "Score", "Scored", "Weights"]

"""Inference engines behind one Protocol.

base.py         the Protocol, requests and results        validation.py   which requests are invalid
open.py         creates the engine of a configuration     sglang/         engine over SGLang servers
embedded.py     engine over a transformers model in the actor's own process, built from
                decoder.py, decode_step.py, attention.py, slots.py, sequences.py and sampling.py
"""

from sgpo_async.engines.base import (
    BroadcastGroups,
    Engine,
    EngineLoad,
    Failed,
    Generate,
    Generated,
    SampledTokens,
    Score,
    Scored,
    Weights,
)
from sgpo_async.engines.embedded import EmbeddedEngine

__all__ = [
    "BroadcastGroups",
    "EmbeddedEngine",
    "Engine",
    "EngineLoad",
    "Failed",
    "Generate",
    "Generated",
    "SampledTokens",
    "Score",
    "Scored",
    "Weights",
]

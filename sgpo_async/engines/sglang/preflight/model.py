"""Checks that the server has the learner's model, without changing the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json, ServerApi, ServerRefused
from sgpo_async.engines.sglang.weight_sync.layout import Device, answered_checksums, layout_of
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts, model_facts
from sgpo_async.errors import CheckFailed, DataError

INVALID_TOKEN = 10**9  # larger than every vocabulary
REMEDY = "start it with --model-path equal to model.path of the run, or change model.path"


async def model(subject: Subject, server_info: Json) -> str:
    """Compare architecture, vocabulary, parameter names and shapes. Raises CheckFailed with the first difference.

    SGLang does not report shapes. They are compared only if the server's model folder can be read from here; otherwise
    the first weight update fails if a shape differs.
    """
    facts, timeout_s = subject.model, subject.engine.sglang.phase_timeout_s
    wanted = list(facts.config.get("architectures") or [])
    if (has := list(server_info.get("architectures") or [])) != wanted:
        raise CheckFailed(f"it has a {', '.join(has)}, the run a {', '.join(wanted)}", REMEDY)
    size = await vocabulary(subject.server.api, timeout_s=timeout_s)
    if size != facts.vocabulary:
        raise CheckFailed(f"its vocabulary has {size} tokens, the model's {facts.vocabulary}", REMEDY)
    device: Device = "cpu" if subject.device == "cpu" else "cuda"
    expected = layout_of(facts.config, tp=subject.engine.sglang.tp, device=device)
    answer = await subject.server.api.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
    for rank, held in enumerate(answered_checksums(answer)):
        if differing := sorted(expected.keys() ^ held.keys()):
            where = "only the run has" if differing[0] in expected else "only the server has"
            raise CheckFailed(f"another model: {where} {differing[0]} (rank {rank})", REMEDY)
    compared = _compare_shapes(facts, str(server_info.get("model_path")), subject.dtype)
    return f"{wanted[0]}, {size} tokens, {len(expected)} parameters by name" + (" and shape" if compared else "")


async def vocabulary(api: ServerApi, *, timeout_s: float) -> int:
    """The size of the server's vocabulary; SGLang names it when it refuses a logit bias for an invalid token id."""
    sampling = {"max_new_tokens": 1, "logit_bias": {str(INVALID_TOKEN): 0.0}}
    try:
        await api.post("/generate", {"input_ids": [0], "sampling_params": sampling}, timeout_s=timeout_s)
    except ServerRefused as error:
        if match := re.search(r"keys in \[0, (\d+)\]", str(error)):
            return int(match[1]) + 1
        raise CheckFailed(f"it does not report the size of its vocabulary ({error})", "see its log") from None
    raise CheckFailed(f"it accepted a logit bias for token {INVALID_TOKEN}", "see its log")


def _compare_shapes(facts: ModelFacts, folder: str, dtype: str) -> bool:
    """Whether the shapes could be compared. Raises CheckFailed with the first one that differs."""
    if folder == facts.folder:
        return True
    if not (Path(folder) / "config.json").is_file():
        return False
    try:
        other = model_facts(folder, dtype=dtype, tp=facts.tp, device=facts.device, digest=facts.digest)
    except DataError:  # incomplete, so not the folder that the server loaded
        return False
    own, theirs = _shapes(facts), _shapes(other)
    for name, shape in own.items():
        if theirs.get(name, shape) != shape:
            raise CheckFailed(f"another model: its {name} has the shape {theirs[name]}, the run's {shape}", REMEDY)
    return True


def _shapes(facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in facts.skeleton.named_parameters()}

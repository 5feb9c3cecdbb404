"""Checks the server's SGLang version, its HTTP API, and the options with which it was launched.

Two literal tables define what is refused: FIRST_CORRECT by version, RULES by the answer of /server_info.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_async.config.schema import Engine as EngineSettings
from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json
from sgpo_async.errors import CheckFailed, CheckWarning

TESTED = "0.5.23"
OLDEST = (0, 5, 21)  # earlier versions have no /begin_weight_update

# In-flight policy -> the first version in which it is known to work, and what goes wrong in earlier versions.
FIRST_CORRECT: Mapping[str, tuple[tuple[int, ...], str]] = {
    "abort-resume": (OLDEST, ""),
    "retract": ((0, 5, 23), "flushing the cache while retracted requests wait kills the server (sglang #32153)"),
    "in-place": ((0, 5, 23), "an update that flushes kills the server instead of being refused"),
}

# Path -> the fields of its body that this package sends.
INTERFACE: Mapping[str, tuple[str, ...]] = {
    "/generate": (
        *("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "rid", "stream"),
        "return_sampling_mask",
    ),
    "/abort_request": ("rid", "abort_all"),
    "/pause_generation": ("mode",),
    "/continue_generation": (),
    "/begin_weight_update": (),
    "/update_weights_from_tensor": ("serialized_named_tensors", "flush_cache", "weight_version"),
    "/end_weight_update": (),
    "/update_weights_from_disk": ("model_path", "flush_cache", "weight_version"),
    "/weights_checker": ("action", "skip_tensor_list"),
    "/model_info": (),
    "/v1/loads": (),
}
# The same, if the weights arrive by broadcast.
BROADCAST: Mapping[str, tuple[str, ...]] = {
    "/init_weights_update_group": (
        *("master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"),
    ),
    "/update_weights_from_distributed": (
        *("names", "dtypes", "shapes", "group_name", "load_format", "flush_cache", "weight_version"),
    ),
    "/destroy_weights_update_group": ("group_name",),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The required value of a key of /server_info."""

    key: str
    required: Callable[[Subject], Any]
    why: str  # what goes wrong with another value
    remedy: str
    when: Callable[[Subject], bool] = lambda _: True  # whether the rule applies


def _is(value: Any) -> Callable[[Subject], Any]:
    return lambda _: value


RULES = (
    Rule(
        key="incremental_streaming_output",
        required=_is(True),
        why="every message would repeat all tokens",
        remedy="start it with --incremental-streaming-output",
    ),
    Rule(
        key="tp_size",
        required=lambda s: s.engine.sglang.tp,
        why="weights are sent and verified rank by rank",
        remedy="set engine.sglang.tp to the server's --tp-size",
    ),
    Rule(
        key="dtype",
        required=lambda s: s.dtype,
        why="its weights would not be the learner's",
        remedy="start it with --dtype equal to model.dtype",
    ),
    Rule(
        key="device",
        required=lambda s: s.device,
        why="CPUs and GPUs have different checksums",
        remedy="set engine.device (actor: --device) to where the server runs",
    ),
    Rule(
        key="disable_radix_cache",
        required=_is(True),
        why="with in_flight=in-place, old keys and values would serve later requests",
        remedy="start it with --disable-radix-cache, or use engine.sglang.in_flight=abort-resume",
        when=lambda s: s.engine.sglang.in_flight == "in-place",
    ),
    Rule(
        key="dp_size",
        required=_is(1),
        why="updates would not reach every replica as one version",
        remedy="start it without --dp-size; use more servers instead (engine.sglang.servers, or more urls)",
    ),
    Rule(
        key="pp_size",
        required=_is(1),
        why="its checksums are those of pipeline stages",
        remedy="start it without --pp-size; use --tp-size",
    ),
    Rule(
        key="tokenizer_worker_num",
        required=_is(1),
        why="a pause and an update may overtake each other",
        remedy="start it without --tokenizer-worker-num",
    ),
    Rule(
        key="quantization",
        required=_is(None),
        why="quantised weights differ from the ones that are sent, so they cannot be verified",
        remedy="start it without --quantization",
    ),
    Rule(
        key="speculative_algorithm",
        required=_is(None),
        why="the draft model keeps its old weights, and checksums do not cover it",
        remedy="start it without --speculative-algorithm",
    ),
    Rule(
        key="rl_on_policy_target",
        required=_is(None),
        why="its norms are float32, so their checksums differ",
        remedy="start it without --rl-on-policy-target",
    ),
    Rule(
        key="enable_lora",
        required=_is(None),
        why="adapters change the distribution, and checksums do not cover them",
        remedy="start it without --enable-lora",
    ),
    Rule(
        key="preferred_sampling_params",
        required=_is(None),
        why="its penalties would apply to every request",
        remedy="start it without --preferred-sampling-params",
    ),
)


async def version(subject: Subject, server_info: Json) -> str:
    """Check the version number; of an untested version, also check the HTTP API."""
    number = str(server_info.get("version"))
    found = f"SGLang {number}"
    install = f"install sglang=={TESTED} in the server's environment"
    if parsed(number) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise CheckFailed(f"{found}, older than {oldest}, which first had /begin_weight_update", install)
    in_flight = subject.engine.sglang.in_flight
    first, before = FIRST_CORRECT[in_flight]
    if parsed(number) < first:
        raise CheckFailed(
            f"{found} with engine.sglang.in_flight={in_flight}: {before}",
            f"use engine.sglang.in_flight=abort-resume, or {install}",
        )
    if number != TESTED:
        await interface(subject, server_info)
        raise CheckWarning(
            f"{found} is not tested ({TESTED} is), but has all paths and fields", f"if it misbehaves, {install}"
        )
    return found


async def interface(subject: Subject, server_info: Json) -> str:
    """Check that the server's OpenAPI description contains every path and field that this package uses."""
    described = await subject.server.api.get("/openapi.json", timeout_s=subject.engine.sglang.phase_timeout_s)
    used = interface_used(subject.engine)
    if lacking := list(missing(described, used)):
        raise CheckFailed(
            f"SGLang {server_info.get('version')} lacks {', '.join(lacking)}",
            f"install sglang=={TESTED} in the server's environment",
        )
    return f"{len(used)} paths with {sum(map(len, used.values()))} fields"


async def settings(subject: Subject, server_info: Json) -> str:
    """Check the launch options; reports all faults at once, so that the user restarts the server only once."""
    if faults := list(_faults(subject, server_info)):
        raise CheckFailed("; ".join(found for found, _ in faults), "; ".join(remedy for _, remedy in faults))
    if doubts := list(_doubts(subject, server_info)):
        raise CheckWarning("; ".join(found for found, _ in doubts), "; ".join(remedy for _, remedy in doubts))
    cache = "off" if server_info.get("disable_radix_cache") else "on"
    return f"{server_info['device']}, {server_info['dtype']}, tp {server_info['tp_size']}, prefix cache {cache}"


def parsed(number: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.5.23.post1 -> (0, 5, 23); empty if there is none."""
    match = re.match(r"\d+(\.\d+)*", number)
    return tuple(map(int, match[0].split("."))) if match else ()


def interface_used(engine: EngineSettings) -> Mapping[str, tuple[str, ...]]:
    """The paths, and the fields of their bodies, that this package sends with these settings."""
    return {**INTERFACE, **BROADCAST} if engine.sglang.used_transport == "distributed" else INTERFACE


def missing(described: Mapping[str, Any], used: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Entries of `used` that an OpenAPI description lacks: `path`, or `path field`."""
    for path, fields in used.items():
        if path not in described.get("paths", {}):
            yield path
            continue
        known = _fields(described, path)
        yield from (f"{path} {field}" for field in fields if field not in known)


def _fields(described: Mapping[str, Any], path: str) -> set[str]:
    """The fields of a POST request's body; empty if it has no schema."""
    body = described["paths"][path].get("post", {}).get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    references = [schema, *schema.get("anyOf", [])]
    names = [reference["$ref"].rpartition("/")[2] for reference in references if "$ref" in reference]
    schemas = described.get("components", {}).get("schemas", {})
    return {field for name in names for field in schemas.get(name, {}).get("properties", {})}


def _faults(subject: Subject, server_info: Json) -> Iterator[tuple[str, str]]:
    """(found, remedy) of every broken rule."""
    for rule in RULES:
        required = rule.required(subject)
        if not rule.when(subject) or (server_info.get(rule.key) or None) == (required or None):
            continue  # absent, empty and false values all mean "not set"
        if rule.key not in server_info:
            yield f"/server_info lacks {rule.key}", f"install sglang=={TESTED} in the server's environment"
        else:
            yield f"{rule.key} must be {required!r}, got {server_info[rule.key]!r}: {rule.why}", rule.remedy
    room = server_info.get("max_req_input_len")
    if room is not None and room <= subject.tokens:
        found = f"it takes at most {room} tokens, but rollout.max_new_tokens is {subject.tokens}: no prompt fits"
        yield found, "raise its --context-length or --max-total-tokens, or lower rollout.max_new_tokens"


def _doubts(subject: Subject, server_info: Json) -> Iterator[tuple[str, str]]:
    """(found, remedy) of settings that limit throughput or the length of sequences."""
    running = min(
        (s.get("effective_max_running_requests_per_dp", 2**31) for s in server_info.get("internal_states", [])),
        default=2**31,
    )
    if running < subject.server.slots:
        found = f"it decodes at most {running} sequences at a time, but gets {subject.server.slots}: the rest wait"
        yield found, "raise its --max-running-requests (on a GPU: --mem-fraction-static), or lower engine.slots"
    length = server_info.get("context_length")
    if length is not None and length < subject.model.longest:
        found = f"its context_length is {length}, the model's {subject.model.longest}: it refuses longer sequences"
        yield found, "start it without --context-length"

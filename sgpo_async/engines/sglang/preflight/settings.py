"""Which SGLang answers, whether it has what is asked of it, and whether it was started so that it can be used.

Two literal tables say what is refused: FIRST_RIGHT by version, RULES by what /server_info tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json
from sgpo_async.errors import CheckDoubtful, CheckFailed

TESTED = "0.5.23"
OLDEST = (0, 5, 21)  # before, updates did not stand between begin and end

# In-flight policy -> the first version that is known to get it right, and what happens before.
FIRST_RIGHT: Mapping[str, tuple[tuple[int, ...], str]] = {
    "abort-resume": (OLDEST, ""),
    "retract": ((0, 5, 23), "flushing the cache while retracted requests wait kills the server (sglang #32153)"),
    "in-place": ((0, 5, 23), "an update that flushes kills the server instead of being refused"),
}

# Path -> fields of its body that are sent.
INTERFACE: Mapping[str, tuple[str, ...]] = {
    "/generate": (
        *("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "rid", "stream"),
    ),
    "/abort_request": ("rid", "abort_all"),
    "/pause_generation": ("mode",),
    "/continue_generation": (),
    "/begin_weight_update": (),
    "/update_weights_from_tensor": ("serialized_named_tensors", "flush_cache", "weight_version"),
    "/end_weight_update": (),
    "/update_weights_from_disk": ("model_path", "flush_cache", "weight_version"),
    "/weights_checker": ("action",),
    "/model_info": (),
    "/v1/loads": (),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a key of /server_info must tell, and what goes wrong otherwise."""

    key: str
    must: Callable[[Subject], Any]
    why: str
    remedy: str
    when: Callable[[Subject], bool] = lambda _: True


def _is(value: Any) -> Callable[[Subject], Any]:
    return lambda _: value


RULES = (
    Rule(
        key="incremental_streaming_output",
        must=_is(True),
        why="every message would repeat all tokens",
        remedy="start it with --incremental-streaming-output",
    ),
    Rule(
        key="tp_size",
        must=lambda s: s.engine.sglang.tp,
        why="weights are sent and verified rank by rank",
        remedy="set engine.sglang.tp to the server's --tp-size",
    ),
    Rule(
        key="dtype",
        must=lambda s: s.dtype,
        why="its weights would not be the learner's",
        remedy="start it with --dtype equal to model.dtype",
    ),
    Rule(
        key="device",
        must=lambda s: s.device,
        why="CPUs and GPUs have different checksums",
        remedy="set engine.device (actor: --device) to where the server runs",
    ),
    Rule(
        key="disable_radix_cache",
        must=_is(True),
        why="with in_flight=in-place, old keys and values would serve later requests",
        remedy="start it with --disable-radix-cache, or use engine.sglang.in_flight=abort-resume",
        when=lambda s: s.engine.sglang.in_flight == "in-place",
    ),
    Rule(
        key="dp_size",
        must=_is(1),
        why="updates would not reach every replica as one version",
        remedy="start it without --dp-size; more servers do the same (engine.sglang.servers, or more urls)",
    ),
    Rule(
        key="pp_size",
        must=_is(1),
        why="its checksums are those of pipeline stages",
        remedy="start it without --pp-size; use --tp-size",
    ),
    Rule(
        key="tokenizer_worker_num",
        must=_is(1),
        why="a pause and an update may overtake each other",
        remedy="start it without --tokenizer-worker-num",
    ),
    Rule(
        key="quantization",
        must=_is(None),
        why="its weights are not those that are sent, so they cannot be verified",
        remedy="start it without --quantization",
    ),
    Rule(
        key="speculative_algorithm",
        must=_is(None),
        why="the draft model keeps its old weights, and checksums do not cover it",
        remedy="start it without --speculative-algorithm",
    ),
    Rule(
        key="rl_on_policy_target",
        must=_is(None),
        why="its norms are float32, so their checksums differ",
        remedy="start it without --rl-on-policy-target",
    ),
    Rule(
        key="enable_lora",
        must=_is(None),
        why="adapters change the distribution behind the weights that are verified",
        remedy="start it without --enable-lora",
    ),
    Rule(
        key="preferred_sampling_params",
        must=_is(None),
        why="penalties among them would apply to every request",
        remedy="start it without --preferred-sampling-params",
    ),
)


async def version(subject: Subject, told: Json) -> str:
    """Known versions by number; of others, the interface itself is looked at."""
    number = str(told.get("version"))
    found = f"SGLang {number}"
    install = f"install sglang=={TESTED} in the server's environment"
    if parsed(number) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise CheckFailed(f"{found}, older than {oldest}, which first had /begin_weight_update", install)
    in_flight = subject.engine.sglang.in_flight
    first, before = FIRST_RIGHT[in_flight]
    if parsed(number) < first:
        raise CheckFailed(
            f"{found} with engine.sglang.in_flight={in_flight}: {before}",
            f"use engine.sglang.in_flight=abort-resume, or {install}",
        )
    if number != TESTED:
        await interface(subject, told)
        raise CheckDoubtful(f"{found}; tested is {TESTED}; it has all that is asked of it", f"in doubt, {install}")
    return found


async def interface(subject: Subject, told: Json) -> str:
    """Every path and field that is used stands in the server's own description of its interface."""
    described = await subject.server.api.get("/openapi.json", timeout_s=subject.engine.sglang.phase_timeout_s)
    if lacking := list(missing(described)):
        raise CheckFailed(
            f"SGLang {told.get('version')} lacks {', '.join(lacking)}",
            f"install sglang=={TESTED} in the server's environment",
        )
    return f"{len(INTERFACE)} paths with {sum(map(len, INTERFACE.values()))} fields"


async def settings(subject: Subject, told: Json) -> str:
    """Everything that is wrong at once, so that the server is started anew only once."""
    if faults := list(_faults(subject, told)):
        raise CheckFailed("; ".join(found for found, _ in faults), "; ".join(remedy for _, remedy in faults))
    if doubts := list(_doubts(subject, told)):
        raise CheckDoubtful("; ".join(found for found, _ in doubts), "; ".join(remedy for _, remedy in doubts))
    cache = "off" if told.get("disable_radix_cache") else "on"
    return f"{told['device']}, {told['dtype']}, tp {told['tp_size']}, prefix cache {cache}"


def parsed(number: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.5.23.post1 -> (0, 5, 23); empty if there is none."""
    match = re.match(r"\d+(\.\d+)*", number)
    return tuple(map(int, match[0].split("."))) if match else ()


def missing(described: Mapping[str, Any]) -> Iterator[str]:
    """Paths, and fields as `path field`, that an OpenAPI description lacks of INTERFACE."""
    for path, fields in INTERFACE.items():
        if path not in described.get("paths", {}):
            yield path
            continue
        known = _fields(described, path)
        yield from (f"{path} {field}" for field in fields if field not in known)


def _fields(described: Mapping[str, Any], path: str) -> set[str]:
    """Fields of a POST's body; without a schema there are none."""
    body = described["paths"][path].get("post", {}).get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    references = [schema, *schema.get("anyOf", [])]
    names = [reference["$ref"].rpartition("/")[2] for reference in references if "$ref" in reference]
    schemas = described.get("components", {}).get("schemas", {})
    return {field for name in names for field in schemas.get(name, {}).get("properties", {})}


def _faults(subject: Subject, told: Json) -> Iterator[tuple[str, str]]:
    """(found, remedy) of every broken rule."""
    for rule in RULES:
        wanted = rule.must(subject)
        if not rule.when(subject) or (told.get(rule.key) or None) == (wanted or None):
            continue  # what is absent, empty or false is unset
        if rule.key not in told:
            yield f"/server_info does not tell {rule.key}", f"install sglang=={TESTED} in the server's environment"
        else:
            yield f"{rule.key} is {told[rule.key]!r}, not {wanted!r}: {rule.why}", rule.remedy
    room = told.get("max_req_input_len")
    if room is not None and room <= subject.tokens:
        found = f"it takes {room} tokens at most, and rollout.max_new_tokens is {subject.tokens}: no prompt fits"
        yield found, "raise its --context-length or --max-total-tokens, or lower rollout.max_new_tokens"


def _doubts(subject: Subject, told: Json) -> Iterator[tuple[str, str]]:
    """(found, remedy) of what costs throughput or long sequences."""
    running = min(
        (s.get("effective_max_running_requests_per_dp", 2**31) for s in told.get("internal_states", [])), default=2**31
    )
    if running < subject.server.slots:
        found = f"it decodes {running} sequences together, and is given {subject.server.slots}: the rest wait in it"
        yield found, "raise its --max-running-requests (on a GPU: --mem-fraction-static), or lower engine.slots"
    length = told.get("context_length")
    if length is not None and length < subject.model.longest:
        found = f"its context_length is {length}, the model's {subject.model.longest}: longer sequences are refused"
        yield found, "start it without --context-length"

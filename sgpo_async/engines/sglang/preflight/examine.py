"""The checks by name, and the two ways to go through them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from sgpo_async.engines.sglang.preflight.findings import Finding, Subject, finding_of
from sgpo_async.engines.sglang.preflight.logprobs import consistent, teacher_forced
from sgpo_async.engines.sglang.preflight.model import model
from sgpo_async.engines.sglang.preflight.settings import interface, settings, version
from sgpo_async.engines.sglang.preflight.updates import clock, pause, round_trip
from sgpo_async.engines.sglang.processes.api import Json, ServerGone
from sgpo_async.errors import EngineError, SgpoError

# What was found, in a line. Raises CheckWarning, CheckFailed, or what asking the server raises.
Check = Callable[[Subject, Json], Awaitable[str]]

READ_ONLY: dict[str, Check] = {"version": version, "settings": settings}
JOIN: dict[str, Check] = READ_ONLY | {"model": model, "log-probabilities": consistent, "clock": clock}
FULL: dict[str, Check] = READ_ONLY | {
    "interface": interface,
    "model": model,
    "clock": clock,
    "log-probabilities": consistent,
    "weight update": round_trip,
    "learner's model": teacher_forced,
    "pause": pause,
}
REMEDIES = {  # where the error itself names none
    "weight update": "try another engine.sglang.transport; the server's log says more",
}


async def join(subject: Subject) -> list[str]:
    """What a server must show before it takes work; returns warnings. Raises EngineError that names the check."""
    warnings = []
    for finding in await examine(subject, JOIN):
        if finding.outcome == "failed":
            raise EngineError(f"{subject.server.api.url}: {finding.check}: {finding.found}; {finding.remedy}")
        if finding.outcome == "warning":
            warnings.append(f"{subject.server.api.url}: {finding.check}: {finding.found}; {finding.remedy}")
    return warnings


async def examine(subject: Subject, checks: Mapping[str, Check] = FULL) -> list[Finding]:
    """One finding for each check. After a failure only those are made that change nothing and generate nothing."""
    findings: list[Finding] = []
    try:
        told = await _told(subject)
    except SgpoError as error:
        return [finding_of("version", error, remedy=_remedy("version", error))]
    for name, check in checks.items():
        if name not in READ_ONLY and (failed := next((f for f in findings if f.outcome == "failed"), None)):
            findings.append(Finding(name, "not run", f"after {failed.check} is mended"))
            continue
        try:
            findings.append(Finding(name, "ok", await check(subject, told)))
        except SgpoError as error:
            findings.append(finding_of(name, error, remedy=_remedy(name, error)))
    return findings


async def _told(subject: Subject) -> Json:
    """What the server tells of itself: how it was started, and the model that it has."""
    api, timeout_s = subject.server.api, subject.engine.sglang.phase_timeout_s
    now = await api.get("/model_info", timeout_s=timeout_s)
    return await api.get("/server_info", timeout_s=timeout_s) | {"architectures": now.get("architectures")}


def _remedy(check: str, error: SgpoError) -> str:
    if isinstance(error, ServerGone):
        return "look at its log, and start it anew: it has died, or an actor that died has left it paused"
    return REMEDIES.get(check, "look at its log")

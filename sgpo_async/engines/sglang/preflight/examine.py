"""The tables of checks by name, and the two functions that run them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from sgpo_async.engines.sglang.preflight.findings import Finding, Subject, finding_of
from sgpo_async.engines.sglang.preflight.logprobs import consistent, kept_tokens, teacher_forced
from sgpo_async.engines.sglang.preflight.model import model
from sgpo_async.engines.sglang.preflight.settings import interface, settings, version
from sgpo_async.engines.sglang.preflight.updates import clock, pause, round_trip
from sgpo_async.engines.sglang.processes.api import Json, ServerGone
from sgpo_async.errors import EngineError, SgpoError

# A check returns what it found, in one line. It raises CheckWarning, CheckFailed, or the errors of its HTTP requests.
Check = Callable[[Subject, Json], Awaitable[str]]

READ_ONLY: dict[str, Check] = {"version": version, "settings": settings}
JOIN: dict[str, Check] = READ_ONLY | {
    "model": model,
    "log-probabilities": consistent,
    "kept tokens": kept_tokens,
    "clock": clock,
}
FULL: dict[str, Check] = READ_ONLY | {
    "interface": interface,
    "model": model,
    "clock": clock,
    "log-probabilities": consistent,
    "kept tokens": kept_tokens,
    "weight update": round_trip,
    "learner's model": teacher_forced,
    "pause": pause,
}
REMEDIES = {  # for errors that name no remedy themselves
    "weight update": "try another engine.sglang.transport; the server's log says more",
}


async def join(subject: Subject) -> list[str]:
    """Run the checks of a server that joins; returns warnings. Raises EngineError that names the failed check."""
    warnings = []
    for finding in await examine(subject, JOIN):
        if finding.outcome == "failed":
            raise EngineError(f"{subject.server.api.url}: {finding.check}: {finding.found}; {finding.remedy}")
        if finding.outcome == "warning":
            warnings.append(f"{subject.server.api.url}: {finding.check}: {finding.found}; {finding.remedy}")
    return warnings


async def examine(subject: Subject, checks: Mapping[str, Check] = FULL) -> list[Finding]:
    """Run the checks; returns one finding per check. After a failure, only the checks of READ_ONLY are run."""
    findings: list[Finding] = []
    try:
        server_info = await _server_info(subject)
    except SgpoError as error:
        return [finding_of("version", error, remedy=_remedy("version", error))]
    for name, check in checks.items():
        if name not in READ_ONLY and (failed := next((f for f in findings if f.outcome == "failed"), None)):
            findings.append(Finding(name, "not run", f"correct {failed.check} first"))
            continue
        try:
            findings.append(Finding(name, "ok", await check(subject, server_info)))
        except SgpoError as error:
            findings.append(finding_of(name, error, remedy=_remedy(name, error)))
    return findings


async def _server_info(subject: Subject) -> Json:
    """The server's description of itself: its launch options and the architecture of its model."""
    api, timeout_s = subject.server.api, subject.engine.sglang.phase_timeout_s
    now = await api.get("/model_info", timeout_s=timeout_s)
    return await api.get("/server_info", timeout_s=timeout_s) | {"architectures": now.get("architectures")}


def _remedy(check: str, error: SgpoError) -> str:
    if isinstance(error, ServerGone):
        return "see the server's log and restart the server: it died, or an actor that died left it paused"
    return REMEDIES.get(check, "see the server's log")

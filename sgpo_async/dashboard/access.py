"""Who may read a run over HTTP.

no token   loopback only; the Host header must name it, else a web site could read the page by a DNS name of its own
a token    Authorization: Bearer TOKEN, or a cookie, which ?token=TOKEN sets
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sgpo_async.config.rules import endpoint_of, is_loopback
from sgpo_async.errors import SgpoError
from sgpo_async.files import reporting_write_errors

log = logging.getLogger(__name__)

OPEN = "/healthz"  # it names nobody, and a load balancer has no token
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """The rule for one server; `port` makes the cookie its own, because a browser sends cookies to all ports."""

    token: str = field(default="", repr=False)
    port: int = 0

    @property
    def cookie(self) -> str:
        """The name of the cookie."""
        return f"sgpo_async_{self.port}"

    def objection(self, request: web.Request) -> web.Response | None:
        """The answer to a request that is not allowed; None if it is."""
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "this server only answers GET and HEAD", Allow="GET, HEAD")
        if not self.token:
            host = endpoint_of(f"tcp://{request.host}") or endpoint_of(f"tcp://{request.host}:80")
            if host is None or not is_loopback(host[0]):
                return _refusal(403, "the Host header must be 127.0.0.1, localhost or [::1]; or set a token")
            return None
        if request.path == OPEN or self._knows(request):
            return None
        how = "open /?token=TOKEN once, or send Authorization: Bearer TOKEN"
        return _refusal(401, f"a token is needed: {how}", **{"WWW-Authenticate": "Bearer"})

    def _knows(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        bearer = given.strip() if scheme.lower() == "bearer" else ""
        return any(self.is_token(text) for text in (bearer, request.cookies.get(self.cookie, "")))

    def is_token(self, text: str) -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right."""
        return bool(self.token) and hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    def entry(self, request: web.Request) -> web.Response | None:
        """The answer to ?token=TOKEN: the cookie, and the address without the token, so that no history keeps it."""
        if request.method != "GET" or not self.is_token(request.query.get("token", "")):
            return None
        answer = web.Response(status=303, headers={"Location": "./"})
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict", path="/")
        return answer


def guard(access: Access) -> Middleware:
    """The middleware that applies the rule, and gives every answer HEADERS."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        answer: web.StreamResponse
        try:
            answer = access.entry(request) or access.objection(request) or await handler(request)
        except web.HTTPException as error:  # such as an unknown path
            answer = _refusal(error.status, error.reason)
        except Exception:
            log.exception("internal error at %s", request.path)  # without the query, which may hold the token
            answer = _refusal(500, "internal error; see the dashboard's log")
        answer.headers.update(HEADERS)
        return answer

    return guarded


def _refusal(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers=headers)


def token_from(path: Path) -> str:
    """The token in this file, which is made with mode 0600 if it is missing. Raises SgpoError if others can read it."""
    with reporting_write_errors(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32) + "\n")
        found = path.stat()
        token = path.read_text(encoding="utf-8").strip()
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SgpoError(f"--token-file: {path} must not be readable by others; run: chmod 600 {path}")
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise SgpoError(
            f"--token-file: {path} must hold one word of at least 16 ASCII characters; delete it for a new one"
        )
    return token

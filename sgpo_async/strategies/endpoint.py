"""Chat completions of any OpenAI-compatible server. A failure is retried, ends the run, or fails only its request.

status 429 or 500 to 599, lost connection, timeout, incomplete body    retried later (after Retry-After, if given)
status 401, 403, 404                                                   EndpointError: ends the run
any other status of 400 to 499                                         Declined: fails only this request

Requests go through the proxy that the environment names (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY; not for NO_PROXY), but
never those to a server on this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from sgpo_async.errors import EndpointError
from sgpo_async.strategies.prompts import Prompt

BACKOFF_S, LONGEST_PAUSE_S = 1.0, 60.0
FATAL = (401, 403, 404)


class Declined(Exception):
    """The server cannot serve this request, and retrying it cannot help."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server that receives the requests, and its settings. The key is never shown or stored."""

    url: str  # base URL that ends with /v1
    model: str
    name: str = ""  # recorded as provenance; "": host and port of the URL
    key: str = ""
    timeout_s: float = 120.0  # for one request
    tries: int = 8
    max_tokens: int = 1024  # limit for one reply
    structured: bool = False  # whether the server constrains replies by a JSON schema
    extra: Mapping[str, Any] | None = None  # further request fields, e.g. reasoning_effort; None removes a field

    @property
    def known_as(self) -> str:
        """The name that is recorded as provenance."""
        return self.name or urlsplit(self.url).netloc

    def __repr__(self) -> str:
        return f"Server({self.known_as}, {self.model})"


class Reply(NamedTuple):
    """One completion and its token counts."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """Sends requests to one server; an async context manager."""

    def __init__(self, server: Server, *, backoff_s: float = BACKOFF_S) -> None:
        self.server, self._backoff_s = server, backoff_s
        self.retries = 0
        self._answered = False  # whether the server has answered any request so far
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None

    async def __aenter__(self) -> Endpoint:
        """Raises EndpointError if the environment names a proxy that cannot be used."""
        self._proxy = proxy_of(self.server.url)
        headers = {"Authorization": f"Bearer {self.server.key}"} if self.server.key else {}
        timeout = aiohttp.ClientTimeout(total=self.server.timeout_s)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def chat(self, prompt: Prompt, *, temperature: float, seed: int) -> Reply:
        """The reply to one user message.

        Raises:
            EndpointError: the server cannot serve any request; one line.
            Declined: the server rejects this request, or all `tries` tries failed.
        """
        request = self._request(prompt, temperature, seed)
        reason = ""
        for attempt in range(self.server.tries):
            if attempt:
                self.retries += 1
            try:
                return await self._ask(request)
            except _RetryLater as retry:
                reason = retry.reason
                if attempt + 1 < self.server.tries:
                    await asyncio.sleep(self._pause(attempt, retry.after_s))
        raise Declined(f"failed after {self.server.tries} tries: {reason}")

    def _request(self, prompt: Prompt, temperature: float, seed: int) -> dict[str, Any]:
        schema = {"name": "reply", "strict": True, "schema": prompt.schema}
        constraint: dict[str, Any] = {}
        if self.server.structured:
            constraint = {"response_format": {"type": "json_schema", "json_schema": schema}}
        fields = {
            "model": self.server.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "temperature": temperature,
            "max_tokens": self.server.max_tokens,
            "seed": seed,
            **constraint,
            **(self.server.extra or {}),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _pause(self, attempt: int, after_s: float | None) -> float:
        """Seconds before the next try: Retry-After, or exponential backoff with jitter, so that clients spread out."""
        if after_s is not None:
            return min(after_s, LONGEST_PAUSE_S)
        return min(self._backoff_s * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)

    async def _ask(self, request: Mapping[str, Any]) -> Reply:
        assert self._session is not None
        try:
            url = f"{self.server.url.rstrip('/')}/chat/completions"
            async with self._session.post(url, json=request, proxy=self._proxy) as answer:
                self._answered = True
                body = await answer.text()
                self._judge(answer.status, body, answer.headers.get("Retry-After"))
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            if not self._answered:  # wait for a server that restarts, but not for one that has never answered
                remedy = "check HTTPS_PROXY, or set NO_PROXY" if self._proxy else "check --url"
                raise EndpointError(f"{self.server.url}: no server answers ({error}); {remedy}") from None
            raise _RetryLater(f"{type(error).__name__}: {error}") from None
        except aiohttp.ClientHttpProxyError as error:
            message = f"the proxy {_shown(self._proxy)} answers with status {error.status}"
            if error.status < 500:
                raise EndpointError(f"{self.server.url}: {message}; check HTTPS_PROXY, or set NO_PROXY") from None
            raise _RetryLater(message) from None
        except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError) as error:
            raise _RetryLater(f"{type(error).__name__}: {error}".strip(": ")) from None
        return _read(body)

    def _judge(self, status: int, body: str, after: str | None) -> None:
        message = f"status {status}: {' '.join(body.split())[:200]}"
        if status in FATAL:
            remedy = {401: "check the API key", 403: "check the API key", 404: "check --url and --model"}[status]
            raise EndpointError(f"{self.server.url}: {self.server.model}: {message}; {remedy}")
        if status == 429 or status >= 500:
            raise _RetryLater(message, float(after) if after and after.replace(".", "", 1).isdecimal() else None)
        if status >= 400:
            raise Declined(message)


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for this URL, if any; none for NO_PROXY and for this machine itself.

    Raises EndpointError for another kind of proxy than http:// or https://.
    """
    parts = urlsplit(url)
    if _is_loopback(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        name = f"{parts.scheme.upper()}_PROXY"
        raise EndpointError(
            f"{name} must be a proxy of the form http://HOST:PORT, got {_shown(proxy)}; or set NO_PROXY"
        )
    return proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _shown(proxy: str | None) -> str:
    """The proxy without its password."""
    parts = urlsplit(proxy or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class _RetryLater(Exception):
    """A temporary failure: try again after `after_s` seconds, or after the usual backoff if None."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after_s = reason, after_s


def _read(body: str) -> Reply:
    try:
        found = json.loads(body)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError("the content must be text")
        if choice.get("finish_reason") == "abort":  # SGLang's finish reason for requests that /abort_request stopped
            raise _RetryLater("the server aborted the reply")
        # No text: the model refused, or spent all tokens on thinking. A retry would cost the same again.
        return Reply(text or "", int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _RetryLater(f"the response body is not a completion ({type(error).__name__})") from None

"""Chat completions of any OpenAI-compatible server: each failure is retried, or ends the run, or ends the request.

429, 500 to 599, a cut connection, no answer in time, a body that is no whole reply    again, later (Retry-After)
401, 403, 404                                                                           EndpointError: ends the run
another status of 400 to 499                                                            Declined: ends the request
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from sgpo_async.errors import EndpointError
from sgpo_async.strategies.prompts import Prompt

BACKOFF_S, LONGEST_PAUSE_S = 1.0, 60.0
FATAL = (401, 403, 404)


class Declined(Exception):
    """This request cannot be served, and no repetition will change it."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Whom to ask. The key is never shown or stored."""

    url: str  # up to /v1
    model: str
    name: str = ""  # for provenance; "": host and port of its URL
    key: str = ""
    timeout_s: float = 120.0  # of one request
    tries: int = 8
    max_tokens: int = 1024  # of a reply
    structured: bool = False  # replies are held to their form by a JSON schema
    extra: Mapping[str, Any] | None = None  # more fields of the request, e.g. reasoning_effort; None leaves one out

    @property
    def known_as(self) -> str:
        """For provenance."""
        return self.name or urlsplit(self.url).netloc

    def __repr__(self) -> str:
        return f"Server({self.known_as}, {self.model})"


class Reply(NamedTuple):
    """One completion and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """Requests to one server; an async context."""

    def __init__(self, server: Server, *, backoff_s: float = BACKOFF_S) -> None:
        self.server, self._backoff_s = server, backoff_s
        self.retries = 0
        self._answered = False  # at all, by now
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
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
            EndpointError: nothing can be had here; one line.
            Declined: not this one, or not after `tries` tries.
        """
        request = self._request(prompt, temperature, seed)
        reason = ""
        for attempt in range(self.server.tries):
            if attempt:
                self.retries += 1
            try:
                return await self._ask(request)
            except _Later as later:
                reason = later.reason
                await asyncio.sleep(self._pause(attempt, later.after_s))
        raise Declined(f"after {self.server.tries} tries: {reason}")

    def _request(self, prompt: Prompt, temperature: float, seed: int) -> dict[str, Any]:
        schema = {"name": "reply", "strict": True, "schema": prompt.schema}
        held = {"response_format": {"type": "json_schema", "json_schema": schema}} if self.server.structured else {}
        fields = {
            "model": self.server.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "temperature": temperature,
            "max_tokens": self.server.max_tokens,
            "seed": seed,
            **held,
            **(self.server.extra or {}),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _pause(self, attempt: int, after_s: float | None) -> float:
        """What the server asks for, or twice as long each time with some chance, so that clients spread."""
        if after_s is not None:
            return min(after_s, LONGEST_PAUSE_S)
        return min(self._backoff_s * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)

    async def _ask(self, request: Mapping[str, Any]) -> Reply:
        assert self._session is not None
        try:
            url = f"{self.server.url.rstrip('/')}/chat/completions"
            async with self._session.post(url, json=request) as answer:
                self._answered = True
                body = await answer.text()
                self._judge(answer.status, body, answer.headers.get("Retry-After"))
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            if not self._answered:  # a server that restarts is waited for, one that never was there is not
                raise EndpointError(f"{self.server.url}: nothing answers there ({error}); check --url") from None
            raise _Later(f"{type(error).__name__}: {error}") from None
        except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError) as error:
            raise _Later(f"{type(error).__name__}: {error}".strip(": ")) from None
        return _read(body)

    def _judge(self, status: int, body: str, after: str | None) -> None:
        said = f"status {status}: {' '.join(body.split())[:200]}"
        if status in FATAL:
            remedy = {401: "check the API key", 403: "check the API key", 404: "check --url and --model"}[status]
            raise EndpointError(f"{self.server.url}: {self.server.model}: {said}; {remedy}")
        if status == 429 or status >= 500:
            raise _Later(said, float(after) if after and after.replace(".", "", 1).isdigit() else None)
        if status >= 400:
            raise Declined(said)


class _Later(Exception):
    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after_s = reason, after_s


def _read(body: str) -> Reply:
    try:
        found = json.loads(body)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError("the content is no text")
        if choice.get("finish_reason") == "abort":  # SGLang's word for whom /abort_request met
            raise _Later("cut short by the server")
        # Without text: refused, or all tokens spent on thinking. It is paid for, and would be so at every repetition.
        return Reply(text or "", int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _Later(f"a body that is no completion ({type(error).__name__})") from None

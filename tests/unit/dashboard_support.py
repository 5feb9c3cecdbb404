"""A dashboard in this process, of a run whose hub is a test's, and HTTP requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from hub_support import Driver, make_run, train_one_step

from sgpo_async.dashboard.access import Access
from sgpo_async.dashboard.observer import Observer
from sgpo_async.dashboard.server import Dashboard

TOKEN = "0123456789abcdef" * 4

HOSTILE = "</td></tr><script>alert(1)</script><img src=x onerror=alert(2)>\"'\x1b[31m\u202e"


def trained_status() -> dict[str, Any]:
    """What a hub says after one step."""
    hub = Driver(make_run(steps=5))
    hub.learner()
    hub.actor(b"a", credit=3)
    hub.core.actors[b"a"].state = "serving"
    train_one_step(hub)
    return hub.core.status() | {"uptime_s": 1000.0}  # it began before the test


def observer_of(folder: Path | None = None, status: Mapping[str, Any] | None = None, *, age_s: float = 0.0) -> Observer:
    """An observer whose hub has said this, so long ago."""
    import time

    observer = Observer(hub="" if folder else "tcp://127.0.0.1:1", folder=folder)
    observer.poll()
    if status is not None:
        observer._watch._take(dict(status), time.monotonic() - age_s)
    return observer


def ask(
    observer: Observer,
    *questions: Callable[[TestClient], Awaitable[Any]],
    token: str = "",
) -> list[Any]:
    """Put these questions to a dashboard of this observer, one after the other; return their answers."""

    async def answers() -> list[Any]:
        async with TestClient(TestServer(Dashboard(observer, Access(token, 8265)).app)) as client:
            return [await question(client) for question in questions]

    return asyncio.run(answers())


def get(path: str, *, method: str = "GET", **headers: str) -> Callable[[TestClient], Awaitable[tuple[int, str, Any]]]:
    """A question whose answer is (status, text, headers); redirects are not followed, and cookies not kept."""

    async def question(client: TestClient) -> tuple[int, str, Any]:
        async with client.request(method, path, headers=headers, allow_redirects=False) as answer:
            client.session.cookie_jar.clear()
            return answer.status, await answer.text(), answer.headers

    return question


def get_json(path: str) -> Callable[[TestClient], Awaitable[Any]]:
    """A question whose answer is JSON."""

    async def question(client: TestClient) -> Any:
        async with client.get(path) as answer:
            return await answer.json()

    return question

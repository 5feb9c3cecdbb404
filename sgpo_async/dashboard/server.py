"""The HTTP server: one process and one loop, which asks the hub at the same pace however many browsers look at it.

observer.poll ◀── every POLL_S ── loop ── GET ──▶ sections, charts, prometheus
                                   └ ends by a signal, or with its parent's end of standard input
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import web

from sgpo_async.config.rules import is_loopback, url_host
from sgpo_async.dashboard.access import Access, guard
from sgpo_async.dashboard.observer import Observer, RunView
from sgpo_async.dashboard.prometheus import exposition
from sgpo_async.dashboard.sections import curves, newest_step, samples, sections
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole
from sgpo_async.logs import fields
from sgpo_async.processes.signals import HANDLED
from sgpo_async.report.advisories import Facts, advise
from sgpo_async.report.style import STYLE

log = logging.getLogger(__name__)

POLL_S = 0.5
HTML, CSS, SCRIPT, PROMETHEUS = "text/html", "text/css", "text/javascript", "text/plain; version=0.0.4; charset=utf-8"


class Dashboard:
    """The answers to every path; each is made from the view at this moment."""

    def __init__(self, observer: Observer, access: Access) -> None:
        self._observer = observer
        self._curves: dict[bool, tuple[tuple[int, int], str]] = {}  # drawn for these (steps, last step)
        self.app = web.Application(middlewares=[guard(access)])
        own = {
            name: resources.files(__package__).joinpath(f"page.{name}").read_text() for name in ("html", "css", "js")
        }
        for path, kind, text in (
            ("/", HTML, own["html"]),
            ("/page.css", CSS, STYLE + own["css"]),
            ("/page.js", SCRIPT, own["js"]),
        ):
            self.app.router.add_get(path, _fixed(text, kind))
        for path, handler in (
            ("/api/status", self.status),
            ("/api/curves", self.curves),
            ("/api/samples", self.samples),
            ("/metrics", self.metrics),
            ("/healthz", self.health),
        ):
            self.app.router.add_get(path, handler)

    async def status(self, _request: web.Request) -> web.Response:
        """State, advice, and the HTML of the sections."""
        run = self._observer.view()
        advice = advise(Facts(run.view.status, run.view.history, run.settings))
        return _json(
            _state(run)
            | {"name": run.view.name, "live": run.state not in ("ended", "interrupted")}
            | {"advice": [one.__dict__ for one in advice], "html": sections(run, advice)}
        )

    async def curves(self, request: web.Request) -> web.Response:
        """The charts, if there is a step after `since`."""
        run = self._observer.view()
        history, whole = run.view.history, request.query.get("all") == "1"
        newest = newest_step(history)
        if str(newest) == request.query.get("since"):
            return _json({"step": newest, "html": None})
        known = (len(history), newest)
        if self._curves.get(whole, ((), ""))[0] != known:
            self._curves[whole] = known, curves(run, all_metrics=whole)
        return _json({"step": newest, "html": self._curves[whole][1]})

    async def samples(self, request: web.Request) -> web.Response:
        """The newest completions."""
        query = request.query
        html = samples(self._observer.view(), outcome=query.get("outcome", ""), problem=query.get("problem", ""))
        return _json({"html": html})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus' text format."""
        body = exposition(self._observer.view())
        return web.Response(body=body, headers={"Content-Type": PROMETHEUS})

    async def health(self, _request: web.Request) -> web.Response:
        """Whether the run is well."""
        run = self._observer.view()
        return _json(_state(run), status=200 if run.healthy else 503)


def _state(run: RunView) -> dict[str, Any]:
    return {
        "state": run.state,
        "reason": run.reason,
        "step": run.view.step,
        "steps": run.view.steps,
        "age_s": run.age_s,
    }


def _fixed(text: str, kind: str) -> Any:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind)

    return handler


def _json(values: dict[str, Any], *, status: int = 200) -> web.Response:
    answer = web.json_response(values, status=status)
    answer.enable_compression()
    return answer


async def serve(observer: Observer, listen: tuple[str, int], *, token: str, contact: Path | None) -> int:
    """Serve until a signal arrives; return 128 + its number.

    With `contact` write the address into this file, and end with standard input, with 0: this process belongs to the
    one at its other end.

    Raises SgpoError if the address cannot be used.
    """
    host, _ = listen
    assert token or is_loopback(host), "the command checks it"
    try:
        bound = socket.create_server(listen, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        address = f"{url_host(host)}:{listen[1]}"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise SgpoError(f"--listen: {address} cannot be used ({reason}); choose another port, or 0") from None
    port = bound.getsockname()[1]
    url = f"http://{url_host(host)}:{port}/"
    quiet = logging.getLogger(f"{__name__}.requests")
    quiet.disabled = True  # aiohttp logs malformed requests with their first line, which may hold the token
    runner = web.AppRunner(Dashboard(observer, Access(token, port)).app, access_log=None, logger=quiet)
    await runner.setup()
    await web.SockSite(runner, bound).start()
    log.info("dashboard at %s", url, extra=fields(event="dashboard", url=url))
    if contact:
        write_whole(contact, json.dumps({"url": url, "pid": os.getpid()}))
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    _end_by(ended, standard_input=contact is not None)
    try:
        while not ended.done():
            observer.poll()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ended), POLL_S)
        return ended.result()
    finally:
        if contact:
            contact.unlink(missing_ok=True)
        await runner.cleanup()


def _end_by(ended: asyncio.Future[int], *, standard_input: bool) -> None:
    """Set `ended` when a signal arrives, or at the end of standard input."""
    loop = asyncio.get_running_loop()

    def end(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    for number in HANDLED:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # ignored: started by nohup
            loop.add_signal_handler(number, end, 128 + number)

    def read() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            end(0)

    if standard_input:
        loop.add_reader(0, read)

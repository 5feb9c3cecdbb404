"""A text server runs while some work is done. A stub replaces SGLang; it lives, dies or stays silent on demand."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.sglang.serving.texts import TextServer, text_server
from sgpo_async.errors import DataError, EngineError, SgpoError
from sgpo_async.model.folder import model_folder

MODEL = model_folder("builtin:cues")
pytestmark = pytest.mark.process

STUB = """
import http.server, os, pathlib, sys, threading, time
port, behaviour = int(sys.argv[sys.argv.index("--port") + 1]), pathlib.Path({behaviour!r})
def live():
    while behaviour.read_text() != "die":
        time.sleep(0.02)
    print("out of memory", flush=True)
    os._exit(3)
threading.Thread(target=live, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = b"{{}}"
        self.send_response(503 if behaviour.read_text() == "be busy" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
if behaviour.read_text() == "be silent":
    time.sleep(60)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Stub:
    """A stub server, and the file that controls its behaviour."""

    def __init__(self, folder: Path, behaviour: str = "live") -> None:
        self.behaviour, self.log = folder / "behaviour", folder / "server.log"
        self.behaviour.write_text(behaviour)
        (folder / "stub.py").write_text(STUB.format(behaviour=str(self.behaviour)))
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "stub.py"} "$@"\n')
        self.python.chmod(0o755)

    def during(self, work: Coroutine[Any, Any, None], *, start_s: float = 30.0) -> None:
        own = Sglang(python=str(self.python), start_timeout_s=start_s)
        engine = Engine(kind="sglang", device="cpu", slots=4, sglang=own)

        async def run() -> None:
            server = text_server(MODEL, engine, dtype="float32", served_name="model", log=self.log)
            async with server as server:
                assert isinstance(server, TextServer) and server.url.endswith("/v1")
                await server.during(work)

        try:
            asyncio.run(run())
        finally:
            work.close()
            stubs = [
                p for p in psutil.Process().children(recursive=True) if str(self.python.parent) in str(p.cmdline())
            ]
            assert stubs == []


async def nothing() -> None:
    pass


async def fail(error: SgpoError) -> None:
    raise error


def test_the_work_is_done_and_then_the_server_is_stopped(tmp_path: Path) -> None:
    done = []

    async def work() -> None:
        await asyncio.sleep(0.3)
        done.append(True)

    Stub(tmp_path).during(work())
    assert done == [True]


def test_an_error_of_the_work_is_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such problem"):
        Stub(tmp_path).during(fail(DataError("no such problem")))


def test_a_server_that_dies_ends_the_work_with_the_end_of_its_log(tmp_path: Path) -> None:
    stub, ended = Stub(tmp_path), []

    async def work() -> None:
        stub.behaviour.write_text("die")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(time.monotonic())
            raise

    with pytest.raises(EngineError, match=r"has ended; the end of .*server.log:\n(.*\n)*.*out of memory"):
        stub.during(work())
    assert len(ended) == 1


def test_work_that_fails_because_the_server_died_raises_the_end_of_its_log(tmp_path: Path) -> None:
    stub = Stub(tmp_path)

    async def work() -> None:
        stub.behaviour.write_text("die")
        raise EngineError("the server does not answer")

    with pytest.raises(EngineError, match=r"has ended; (.*\n)*.*out of memory"):
        stub.during(work())


def test_a_server_may_die_when_the_work_is_done(tmp_path: Path) -> None:
    stub = Stub(tmp_path)

    async def work() -> None:
        stub.behaviour.write_text("die")
        time.sleep(0.5)  # blocks the event loop, so the server is not checked meanwhile

    stub.during(work())


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("die", r"has ended; the end of .*server.log:\n(.*\n)*.*out of memory"),
        ("be silent", r"not ready within 2 s \(.*\); see .*server.log, or raise engine.sglang.start_timeout_s"),
        ("be busy", r"not ready within 2 s \(http://.+\); see .*server.log"),
    ],
)
def test_a_server_that_does_not_start_is_reported(tmp_path: Path, behaviour: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Stub(tmp_path, behaviour).during(nothing(), start_s=2.0 if behaviour != "die" else 30.0)

"""A network that resets all connections to the hub again and again: the run goes on, every step is trained once."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from run_support import assert_all_trained, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(1200)]
STEPS = 30
RESET_EVERY_S = 4.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: the peer gets a reset and not an end


class ResettingProxy:
    """Forwards TCP connections to `target`, and resets all of them every so often."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._closing = threading.Event()
        self.resets = 0
        for work in (self._accept, self._reset):
            threading.Thread(target=work, daemon=True).start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except ConnectionRefusedError:
                    client.close()
                    continue
                self._open |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # one of them was reset
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            end.close()

    def _reset(self) -> None:
        while not self._closing.wait(RESET_EVERY_S):
            connections, self._open = self._open, set()
            self.resets += bool(connections)
            for connection in connections:
                with suppress(OSError):  # it has ended by itself
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    connection.shutdown(socket.SHUT_RDWR)
                    connection.close()


@contextmanager
def proxy_to(address: str) -> Iterator[ResettingProxy]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    proxy = ResettingProxy((host, int(port)))
    yield proxy
    proxy.close()


@pytest.mark.slow
def test_connections_that_are_reset_cost_no_step(tmp_path: Path) -> None:
    settings = (f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", "evaluation.every=5", "hub.max_lag=8")
    with real_run(tmp_path, *settings) as run:
        hub = run.hub()
        with proxy_to(run.address()) as proxy:
            learner = run.learner("--hub", proxy.address)
            actors = [run.actor(f"actor-{number}", hub=proxy.address) for number in range(2)]
            until(lambda: proxy.resets >= 3, "some resets")
            assert learner.wait(900) == 0, learner.output[-3000:]
            for actor in actors:  # also one that was without a connection when the run ended
                assert actor.wait() == 0, actor.output[-3000:]
            assert hub.wait() == 0
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        summary = run.summary()
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
        assert [one["version"] for one in summary["evaluations"]] == list(range(0, STEPS + 1, 5))
        assert "connected to the hub again" in learner.output
        assert summary["rejected"] == 0

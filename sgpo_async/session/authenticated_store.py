"""The rendezvous of a session: a store of torch that accepts only values authenticated with the session's secret.

    weight receiver ── "here" ──▶ TCPStore ──▶ weight sender: only now does it open the ports of Torch RPC
    each process ◀── the addresses of its peer ──▶ TCPStore                        (every value has its tag before it)

TCPStore serves everybody who reaches its port. A stranger there can write and delete values, but cannot make one that
is accepted. The keys are hashed with the secret, so a stranger does not write to one of them by accident. If a stranger
destroys values, the session fails, and the actor joins again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sgpo_async.session.secret import Forged, authenticate, tag, verify

_LOOK_S = 0.05


class AuthenticatedStore(dist.Store):
    """Writes every value to `store` with an authentication tag for its key, and accepts no value without it."""

    def __init__(self, store: dist.Store, secret: bytes) -> None:
        super().__init__()
        self._store: Any = store  # its methods take bytes, which their types do not say
        self._secret = secret

    def wait_until_set(self, key: str) -> None:
        """Return when a process that knows the secret has set `key`; the caller enforces the deadline."""
        while not self._is_set(key):
            time.sleep(_LOOK_S)

    def _is_set(self, key: str) -> bool:
        if not self.check([key]):
            return False
        try:
            self.get(key)
        except RuntimeError:  # a stranger has set it, and the other process may set it again
            return False
        return True

    # ---- the interface of `torch.distributed.Store`, as `init_rpc` uses it

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._name(key), self._authenticate(key, value))

    def get(self, key: str) -> bytes:
        return self._verify(key, self._store.get(self._name(key)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        # Torch's "" stands for "the key is new".
        expected = self._authenticate(key, expected_value) if expected_value else b""
        desired = self._authenticate(key, desired_value)
        return self._verify(key, self._store.compare_set(self._name(key), expected, desired))

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check([self._name(key) for key in keys]))

    def wait(self, keys: Sequence[str], *timeout: timedelta) -> None:
        self._store.wait([self._name(key) for key in keys], *timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def _name(self, key: str) -> str:
        return tag(self._secret, b"key", key.encode()).hex()

    def _authenticate(self, key: str, value: Any) -> bytes:
        return authenticate(self._secret, key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def _verify(self, key: str, message: Any) -> bytes:
        try:
            return verify(self._secret, key.encode(), bytes(message))
        except Forged as error:
            raise RuntimeError(f"the value of {key} in the rendezvous is a stranger's: {error}") from None

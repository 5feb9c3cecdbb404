"""The rendezvous of a session: a store of torch in which only values count that prove the session's secret.

    weight receiver ── "here", sealed ──▶ TCPStore ──▶ weight sender: only now does it open the ports of Torch RPC
    each process ◀── the addresses of its peer, sealed ──▶ TCPStore

TCPStore serves everybody who reaches its port. A stranger there can write and delete values, but he cannot make one
that counts, and the keys are hashed with the secret, so he does not meet them by chance. If he destroys values, the
session fails, and the actor joins again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sgpo_async.session.secret import Forged, seal, tag, unseal

_LOOK_S = 0.05


class ProvenStore(dist.Store):
    """Seals every value that is written to `store` with its key, and refuses what is not so sealed."""

    def __init__(self, store: dist.Store, secret: bytes) -> None:
        super().__init__()
        self._store: Any = store  # its methods take bytes, which their types do not say
        self._secret = secret

    def await_proof(self, key: str) -> None:
        """Return when a process that knows the secret has set `key`; the caller enforces the deadline."""
        while not self._is_proven(key):
            time.sleep(_LOOK_S)

    def _is_proven(self, key: str) -> bool:
        if not self.check([key]):
            return False
        try:
            self.get(key)
        except RuntimeError:  # a stranger has set it, and the other process may set it again
            return False
        return True

    # ---- the interface of `torch.distributed.Store`, as `init_rpc` uses it

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._name(key), self._seal(key, value))

    def get(self, key: str) -> bytes:
        return self._open(key, self._store.get(self._name(key)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def compare_set(self, key: str, expected_value: Any, desired_value: Any) -> bytes:
        expected = self._seal(key, expected_value) if expected_value else b""  # nothing: if the key is new
        return self._open(key, self._store.compare_set(self._name(key), expected, self._seal(key, desired_value)))

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check([self._name(key) for key in keys]))

    def wait(self, keys: Sequence[str], *timeout: timedelta) -> None:
        self._store.wait([self._name(key) for key in keys], *timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def _name(self, key: str) -> str:
        return tag(self._secret, b"key", key.encode()).hex()

    def _seal(self, key: str, value: Any) -> bytes:
        return seal(self._secret, key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def _open(self, key: str, sealed: Any) -> bytes:
        try:
            return unseal(self._secret, key.encode(), bytes(sealed))
        except Forged as error:
            raise RuntimeError(f"the value of {key} in the rendezvous is a stranger's: {error}") from None

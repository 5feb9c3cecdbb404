"""CURVE keys: one pair each for the hub, for the learner's ranks, and for all actors.

    DIR/server.key           public; members authenticate the hub with it
    DIR/server.key_secret    stays on the hub's node
    DIR/learner.key          public; the hub knows the learner's ranks by it
    DIR/learner.key_secret   on the learner's nodes only
    DIR/actor.key            public; the hub knows actors, and who watches the run, by it
    DIR/actor.key_secret     on every node

CURVE encrypts the connections to the hub and authenticates both sides (ZeroMQ RFC 26, CurveZMQ). The hub refuses a
connection without one of the two secret keys in the handshake, before it reads any message, and knows of every message
with which key it came.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

import zmq.auth

from sgpo_async.errors import HubError

Role = Literal["learner", "actor"]
NAMES = ("server", "learner", "actor")


def create_keys(folder: str | Path) -> list[Path]:
    """Write all key pairs into `folder` (mode 0700, secret keys 0600) and return the six files.

    Raises:
        HubError: the folder already holds keys, or cannot be written.
    """
    folder = Path(folder)
    if present := sorted(folder.glob("*.key*")):
        raise HubError(f"keys: {present[0]} exists, and existing keys are never overwritten; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(
            0o700
        )  # before the files exist, so that no other user can read a secret key before its mode is set
        files = [Path(path) for name in NAMES for path in zmq.auth.create_certificates(folder, name)]
        for path in files:
            path.chmod(0o600 if path.suffix == ".key_secret" else 0o644)
    except OSError as error:
        raise HubError(f"keys: cannot write {folder} ({error.strerror}); choose another folder") from error
    return files


def public_key(folder: str | Path, name: str) -> bytes:
    """The public key of one of NAMES, in Z85."""
    return _load(Path(folder) / f"{name}.key")[0]


def key_pair(folder: str | Path, name: str) -> tuple[bytes, bytes]:
    """Public and secret key of one of NAMES, in Z85.

    Raises:
        HubError: the file is missing, cannot be read, or other users can access it.
    """
    path = Path(folder) / f"{name}.key_secret"
    public, secret = _load(path)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise HubError(f"hub.keys: other users can access {path}; run chmod 600 {path}")
    if secret is None:
        raise missing_key(path)
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise missing_key(path) from error


def missing_key(path: Path) -> HubError:
    """The error for a key file that is missing or holds no key."""
    return HubError(
        f"hub.keys: {path} is missing or holds no key; make keys with 'sgpo-async keys DIR' on the hub's node, and "
        "copy server.key, actor.key and actor.key_secret to every other node, and to the learner's also learner.key "
        "and learner.key_secret"
    )

"""CURVE keys: one pair for the hub, one that all members share.

    DIR/server.key           public, members check the hub by it
    DIR/server.key_secret    stays with the hub
    DIR/client.key           public, the hub knows members by it
    DIR/client.key_secret    every member's node

CURVE encrypts the front door and authenticates both sides (ZeroMQ RFC 26, CurveZMQ): who lacks the client's
secret key is refused in the handshake, before any of its messages is read.
"""

from __future__ import annotations

import stat
from pathlib import Path

import zmq.auth

from sgpo_async.errors import HubError

NAMES = ("server", "client")


def create_keys(folder: str | Path) -> list[Path]:
    """Write both key pairs into `folder` (mode 0700, secrets 0600); returns the four files.

    Raises:
        HubError: the folder holds keys already, or cannot be written.
    """
    folder = Path(folder)
    if present := sorted(folder.glob("*.key*")):
        raise HubError(f"{present[0]} exists; keys are not overwritten, choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # first, so that nobody reads a secret before its own mode is set
        files = [Path(path) for name in NAMES for path in zmq.auth.create_certificates(folder, name)]
        for path in files:
            path.chmod(0o600 if path.suffix == ".key_secret" else 0o644)
    except OSError as error:
        raise HubError(f"keys: cannot write {folder}: {error.strerror}") from error
    return files


def public_key(folder: str | Path, name: str) -> bytes:
    """The public key of "server" or "client", in Z85."""
    return _load(Path(folder) / f"{name}.key")[0]


def key_pair(folder: str | Path, name: str) -> tuple[bytes, bytes]:
    """Public and secret key of "server" or "client", in Z85.

    Raises:
        HubError: the file is missing, unreadable, or open to other users.
    """
    path = Path(folder) / f"{name}.key_secret"
    public, secret = _load(path)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise HubError(f"hub.keys: {path} is open to other users; chmod 600 it")
    if secret is None:
        raise no_key(path)
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise no_key(path) from error


def no_key(path: Path) -> HubError:
    """The error for a key file that is not there or holds nothing."""
    return HubError(
        f"hub.keys: {path} is missing or holds no key; make keys with 'sgpo-async keys DIR' "
        "on the hub's node and copy server.key, client.key and client.key_secret to the other nodes"
    )

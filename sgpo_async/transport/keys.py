"""CURVE keys: one pair for the hub, one for the learner's ranks, and one for each node with actors, or one for all.

    DIR/server.key           public; members authenticate the hub with it
    DIR/server.key_secret    stays on the hub's node
    DIR/learner.key          public; the hub knows the learner's ranks by it
    DIR/learner.key_secret   on the learner's nodes only
    DIR/actor-NAME.key       public; the hub knows the actors of one node, or who watches the run, by it
    DIR/actor-NAME.key_secret   on that node
    DIR/actor.key, actor.key_secret   the same for all nodes without a key of their own

CURVE encrypts the connections to the hub and authenticates both sides (ZeroMQ RFC 26, CurveZMQ). The hub refuses a
connection without the secret key of one of these public ones in the handshake, before it reads any message, and knows
of every message with which key it came. To revoke a key is to delete its public file on the hub's node: a running hub
looks at the folder (`transport.router`).
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import zmq.auth

from sgpo_async.errors import HubError

Role = Literal["learner", "actor"]
SHARED = "actor"  # the name of the key of all nodes without one of their own
NAMES = ("server", "learner", SHARED)


def create_keys(folder: str | Path) -> list[Path]:
    """Write key pairs of hub, learner and all actors into `folder` (mode 0700, secret keys 0600); return the six files.

    Raises:
        HubError: the folder already holds keys, or cannot be written.
    """
    return _create(Path(folder), NAMES, unless="*.key*")


def add_actors(folder: str | Path, actors: Sequence[str]) -> list[Path]:
    """Write a key pair for each of these nodes, and those of hub and learner if they are missing; return the new files.

    Raises:
        HubError: a name is no file name, a key exists already, or the folder cannot be written.
    """
    folder = Path(folder)
    for name in actors:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise HubError(f"keys: the name {name!r} must have 1 to 64 letters, digits, and . _ - between them")
    others = () if (folder / "server.key").exists() else ("server", "learner")
    return _create(folder, [*others, *map(_stem, dict.fromkeys(actors))])


def _create(folder: Path, stems: Sequence[str], *, unless: str = "") -> list[Path]:
    patterns = [unless] if unless else [f"{stem}.key*" for stem in stems]
    if present := sorted(path for pattern in patterns for path in folder.glob(pattern)):
        raise HubError(
            f"keys: {present[0]} exists, and existing keys are never overwritten; choose another folder or name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(
            0o700
        )  # before the files exist, so that no other user can read a secret key before its mode is set
        files = [Path(path) for stem in stems for path in zmq.auth.create_certificates(folder, stem)]
        for path in files:
            path.chmod(0o600 if path.suffix == ".key_secret" else 0o644)
    except OSError as error:
        raise HubError(f"keys: cannot write {folder} ({error.strerror}); choose another folder") from error
    return files


def revoke(folder: str | Path, name: str) -> list[Path]:
    """Delete the key of this node; return the deleted files. Raises HubError if there is none, or it cannot be."""
    files = [path for ending in ("key", "key_secret") if (path := Path(folder) / f"{_stem(name)}.{ending}").exists()]
    if not files:
        raise HubError(f"keys: {folder} has no key {name}; sgpo-async keys {folder} --list shows all")
    try:
        for path in files:
            path.unlink()
    except OSError as error:
        raise HubError(f"keys: cannot delete {path} ({error.strerror})") from error
    return files


def actor_keys(folder: str | Path) -> dict[bytes, str]:
    """The names of the actors' public keys (Z85), without files that hold none."""
    return read_actor_keys(folder)[0]


def read_actor_keys(folder: str | Path) -> tuple[dict[bytes, str], set[str]]:
    """The names of the actors' public keys (Z85); those whose file holds none or cannot be read: half written, say."""
    found, unreadable = {}, set()
    for path in sorted(Path(folder).glob("actor*.key")):
        name = path.stem.removeprefix("actor-")
        if path.stem == _stem(name):
            try:
                found[_load(path)[0]] = name
            except HubError:
                unreadable.add(name)
    return found, unreadable


def key_file(name: str) -> str:
    """The name of the file with the public key of this node."""
    return f"{_stem(name)}.key"


def fingerprint(key: bytes) -> str:
    """A short digest of a public key, for people."""
    return hashlib.blake2b(key, digest_size=8).hexdigest()


def public_key(folder: str | Path, name: str) -> bytes:
    """The public key of server or learner, or in actor.key, in Z85."""
    return _load(Path(folder) / f"{name}.key")[0]


def key_pair(folder: str | Path, name: str) -> tuple[bytes, bytes]:
    """Public and secret key in the file `name`.key_secret, in Z85.

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


def actor_pair(folder: str | Path, name: str) -> tuple[bytes, bytes]:
    """Public and secret key of this node: those of `name`, else the shared ones, else the only ones there.

    Raises:
        HubError: as `key_pair`, or there are several, and none is of `name`.
    """
    stems = [path.stem for path in sorted(Path(folder).glob("actor*.key_secret"))]
    for stem in (_stem(name), SHARED):
        if stem in stems:
            return key_pair(folder, stem)
    if len(stems) > 1:
        raise HubError(
            f"hub.keys: {folder} holds the secret keys of several nodes ({', '.join(stems)}) and none of {name}; "
            "keep that of this node, or start the actor with its --name"
        )
    return key_pair(folder, stems[0] if stems else SHARED)


def _stem(name: str) -> str:
    return SHARED if name == SHARED else f"actor-{name}"


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

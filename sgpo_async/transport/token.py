"""The token by which a learner proves to a hub without keys that it belongs to the hub's user.

hub ── writes, mode 0600 ──▶ FOLDER/hub.token ── reads ──▶ learner ── Hello(token) ──▶ hub (`hub.authority`)

It stays the same when a killed hub is started again, and is removed at the hub's end.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from sgpo_async.files import reporting_write_errors

TOKEN_FILE = "hub.token"


def token_of(folder: Path) -> str:
    """The token of the hub in this folder; "" if there is none, or this user may not read it."""
    try:
        return (folder / TOKEN_FILE).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def make_token(folder: Path) -> str:
    """The token of a hub that starts: that of the hub before a crash, else a new one. Raises SgpoError."""
    path = folder / TOKEN_FILE
    with reporting_write_errors(folder):
        if path.is_symlink() or (path.exists() and not _is_private(path)):
            path.unlink()  # others may know it
        if token := token_of(folder):
            return token
        path.unlink(missing_ok=True)
        token = secrets.token_hex(32)
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(token + "\n", encoding="ascii")
    return token


def _is_private(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)

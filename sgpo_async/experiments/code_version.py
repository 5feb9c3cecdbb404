"""Which code made a result: the package's version and, in a checkout, its commit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import sgpo_async
from sgpo_async.experiments.plan import Result

DEADLINE_S = 10.0  # of git, which may hang on a network's file system


def code_version() -> dict[str, str | None]:
    """`version`, and `commit`: with -dirty behind it if files differ from it; None outside a checkout."""
    return {"version": sgpo_async.__version__, "commit": commit(Path(sgpo_async.__file__).parent.parent)}


def commit(root: Path) -> str | None:
    """The commit checked out at `root`; None if `root` is not the top of a checkout, or git does not say.

    Only the top counts: a package installed somewhere below another project's checkout is not of that project's commit.
    """
    if not (root / ".git").exists():
        return None
    words = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def codes(results: Iterable[Result]) -> str:
    """The versions and commits of these results, each once."""
    found = {(result["version"], result.get("commit") or "") for result in results}
    return "; ".join(f"{version}, commit {_short(commit_)}" for version, commit_ in sorted(found))


def _short(commit_: str) -> str:
    digest, *dirty = commit_.split("-")
    return "-".join([digest[:12], *dirty]) if digest else "unknown"

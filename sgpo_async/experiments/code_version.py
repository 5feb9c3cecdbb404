"""The code that produced a result: the version of the package and, in a Git checkout, its commit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import sgpo_async
from sgpo_async.experiments.plan import Result

DEADLINE_S = 10.0  # for git, which may hang on a network file system


def code_version() -> dict[str, str | None]:
    """`version`, and `commit`, followed by -dirty if files were changed; `commit` is None outside a checkout."""
    return {"version": sgpo_async.__version__, "commit": commit(Path(sgpo_async.__file__).parent.parent)}


def commit(root: Path) -> str | None:
    """The commit checked out at `root`; None if `root` is not the top of a checkout, or if git fails.

    Only the top counts: the package may be installed inside the checkout of another project.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def codes(results: Iterable[Result]) -> str:
    """The distinct versions and commits of these results."""
    found = {(result["version"], result.get("commit") or "") for result in results}
    return "; ".join(f"{version}, commit {_short(commit_)}" for version, commit_ in sorted(found))


def _short(commit_: str) -> str:
    digest, *dirty = commit_.split("-")
    return "-".join([digest[:12], *dirty]) if digest else "unknown"

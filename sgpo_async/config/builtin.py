"""Configurations that come with the package: `builtin:NAME` is configs/NAME.yaml, also where it is installed.

A relative path in such a file is relative to the working directory, as in every other configuration.
"""

from __future__ import annotations

import difflib
import re
from itertools import takewhile
from pathlib import Path

from sgpo_async.errors import ConfigError
from sgpo_async.installation import shipped

PREFIX, SUFFIX = "builtin:", ".yaml"


def is_builtin(name: str | Path) -> bool:
    """Whether this is the name of a configuration of the package, and not a path."""
    return str(name).startswith(PREFIX)


def builtin_names() -> list[str]:
    """All names, e.g. builtin:demo, those of experiments last."""
    folder = shipped("configs")
    names = [str(file.relative_to(folder)).removesuffix(SUFFIX) for file in folder.rglob(f"*{SUFFIX}")]
    return [PREFIX + name for name in sorted(names, key=lambda name: ("/" in name, name))]


def located(name: str | Path) -> Path:
    """The file of a configuration: a path as it is, a builtin name as the path of its file.

    Raises ConfigError for an unknown name, with the nearest one.
    """
    if not is_builtin(name):
        return Path(name)
    word, names = str(name).removeprefix(PREFIX).removesuffix(SUFFIX), builtin_names()
    if PREFIX + word not in names:
        last = {one.removeprefix(PREFIX).rpartition("/")[2]: one for one in names}
        near = difflib.get_close_matches(word.rpartition("/")[2], last, n=1, cutoff=0.6)
        hint = f"did you mean {last[near[0]]}?" if near else "'sgpo-async configs' lists them"
        raise ConfigError(f"{name}: no configuration of this name comes with sgpo-async; {hint}")
    return shipped("configs") / f"{word}{SUFFIX}"


def summary(name: str) -> str:
    """The first sentence of the comment at the head of the file."""
    lines = located(name).read_text(encoding="utf-8").splitlines()
    paragraph = takewhile(lambda line: line.startswith("# "), lines)
    return re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(line[2:] for line in paragraph), maxsplit=1)[0]

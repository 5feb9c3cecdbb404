"""Finds a user's own functions, named MODULE:FUNCTION in the configuration. Does not import torch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from sgpo_async.errors import DataError


def is_own(name: str) -> bool:
    """Whether `name` has the form MODULE:FUNCTION."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), function])


def import_function(key: str, name: str) -> Callable[..., Any]:
    """The function MODULE:FUNCTION. Modules in the working folder are found, after all other places.

    Raises DataError, one line that begins with `key`, if the module cannot be imported or has no such function.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # the module is the user's own code
        raise DataError(f"{key}: {name}: cannot import {module} from {here} ({describe(error)})") from error
    if not callable(found):
        raise DataError(f"{key}: {name}: {module} has no function {attribute}; define it, or correct the name")
    return found


def describe(error: BaseException) -> str:
    """The kind, the first line and the place of an error in a user's code, as one line."""
    text = (str(error).splitlines() or [""])[0]
    line = error.__traceback__
    while line is not None and line.tb_next is not None:
        line = line.tb_next
    place = f" at {line.tb_frame.f_code.co_filename}:{line.tb_lineno}" if line is not None else ""
    return f"{type(error).__name__}{': ' if text else ''}{text:.200}{place}"

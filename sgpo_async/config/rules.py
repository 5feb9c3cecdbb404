"""The checks that every section of the configuration uses, the text of their errors, and what marks a setting."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from sgpo_async.errors import ConfigError

PATH = {"path": True}  # metadata of a setting that names a file or a folder: ~ in it is expanded
INFINITE = {"infinite": True}  # metadata of a number that may be .inf; every other one must be finite


def require(holds: bool, path: str, rule: str, value: object, remedy: str = "") -> None:
    """Raise ConfigError unless the rule holds, as `PATH RULE, got VALUE; REMEDY`.

    Args:
        path: the key, e.g. "optim.lr", or the command line option.
        rule: e.g. "must be > 0".
        remedy: what the user can do, if the rule does not say it; "": no remedy.
    """
    if not holds:
        raise ConfigError(f"{path} {rule}, got {value!r}" + (f"; {remedy}" if remedy else ""))


def require_one_of(path: str, value: str, names: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `names`; it says which of them is the nearest."""
    near = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.3)
    require(
        value in names, path, f"must be one of {', '.join(names)}", value, f"did you mean {near[0]}?" if near else ""
    )


def require_patterns(path: str, patterns: Mapping[str, str]) -> None:
    """Raise ConfigError unless all are regular expressions, with names that can be part of a metric's."""
    for name, pattern in patterns.items():
        require(bool(re.fullmatch(r"[\w-]+", name)), path, "must have names of letters, digits, _ and -", name)
        # In YAML "\b" is a backspace between double quotes, and the expression would match nothing.
        rule = "must have no control characters; between double quotes write each backslash twice"
        require(not any(unicodedata.category(one) == "Cc" for one in pattern), f"{path}.{name}", rule, pattern)
        try:
            re.compile(pattern)
        except re.error as error:
            require(False, f"{path}.{name}", f"must be a regular expression ({error})", pattern)


def require_finite(section: Any, prefix: str = "") -> None:
    """Raise ConfigError unless every float in this section, and in those within it, is a number and finite."""
    for setting in dataclasses.fields(section):
        value, path = getattr(section, setting.name), f"{prefix}{setting.name}"
        if dataclasses.is_dataclass(value):
            require_finite(value, f"{path}.")
        for number in value if isinstance(value, list) else [value]:
            allowed = number == math.inf and setting.metadata.get("infinite", False)
            finite = not isinstance(number, float) or math.isfinite(number) or allowed
            require(finite, path, "must be a finite number", number)


def expanded(path: str, value: str) -> str:
    """The file or folder that the setting `path` names, with ~ expanded. Raises ConfigError for an unknown ~USER."""
    found = os.path.expanduser(value)  # noqa: PTH111 (Path would remove ./ and trailing slashes, which hub names lack)
    require(not found.startswith("~"), path, "must not begin with ~, because there is no such home folder", value)
    return found


def endpoint_of(address: str) -> tuple[str, int] | None:
    """HOST, without the brackets of IPv6, and PORT of tcp://HOST:PORT; None if the address has another form."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    well_formed = address.startswith("tcp://") and bool(host) and port.isdecimal() and int(port) < 65536
    return (host.strip("[]"), int(port)) if well_formed else None


def is_loopback(host: str) -> bool:
    """Whether this host, without brackets, is a name of this machine's loopback."""
    return host in ("127.0.0.1", "localhost", "::1")


def listen_address(path: str, value: str) -> tuple[str, int]:
    """HOST and PORT of HOST:PORT. Raises ConfigError that names `path` if the value has another form."""
    found = endpoint_of(f"tcp://{value}")
    require(found is not None, path, "must look like HOST:PORT", value, "on this machine alone: 127.0.0.1:8265")
    assert found
    return found


def url_host(host: str) -> str:
    """A host as it stands in tcp://HOST:PORT: an IPv6 address has brackets."""
    return f"[{host}]" if ":" in host else host


def host_of(path: str, address: str) -> str:
    """HOST of tcp://HOST:PORT. Raises ConfigError that names `path` if the address has another form."""
    require(endpoint_of(address) is not None, path, "must look like tcp://HOST:PORT", address)
    return address.removeprefix("tcp://").rpartition(":")[0]

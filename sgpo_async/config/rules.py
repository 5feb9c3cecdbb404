"""The checks that every section of the configuration uses, and the text of their errors."""

from __future__ import annotations

from sgpo_async.errors import ConfigError


def require(holds: bool, path: str, rule: str, value: object, remedy: str = "") -> None:
    """Raise ConfigError unless the rule holds, as `PATH RULE, got VALUE; REMEDY`.

    Args:
        path: the key, e.g. "optim.lr", or the command line option.
        rule: e.g. "must be > 0".
        remedy: what the user can do, if the rule does not say it; "": no remedy.
    """
    if not holds:
        raise ConfigError(f"{path} {rule}, got {value!r}" + (f"; {remedy}" if remedy else ""))


def host_of(path: str, address: str) -> str:
    """HOST of tcp://HOST:PORT. Raises ConfigError that names `path` if the address has another form."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    well_formed = address.startswith("tcp://") and bool(host) and port.isdigit() and int(port) < 65536
    require(well_formed, path, "must look like tcp://HOST:PORT", address)
    return host

"""Read a YAML file and `key=value` overrides into one frozen `Run`, or raise an error of one line.

A setting that is a text has exactly the characters that were typed, and ~ is expanded where it is a path. Only this
module and experiment.py use OmegaConf: all other modules see typed, validated dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpo_async.config.builtin import is_builtin
from sgpo_async.config.layers import Layer, parse_text, parse_yaml, read_layer
from sgpo_async.config.rules import expanded
from sgpo_async.config.schema import Run
from sgpo_async.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read the YAML file at `path`, apply the overrides in their order, validate, return the run.

    An empty path means the defaults. An override is `key=value`, or another YAML file, e.g. builtin:paper. The name
    of an existing file means this file, also if it contains "=".

    Raises ConfigError, one line: file or override, key path, rule and value, or the nearest valid key.
    """
    return _build(_layers(path, overrides))


def overridden(run: Run, overrides: Sequence[str]) -> Run:
    """The run with overrides as in `load`. Raises ConfigError."""
    return _build([Layer("settings", to_plain(run), {}), *_layers("", overrides)]) if overrides else run


def given_keys(path: str | Path, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The paths of the keys that the file and the overrides set. Raises ConfigError if they cannot be read."""
    return frozenset(key for layer in _layers(path, overrides) for key, _ in by_key_path(layer.values))


def _layers(path: str | Path, overrides: Sequence[str]) -> list[Layer]:
    """The file and the overrides, in the order in which they apply."""
    layers = [read_layer(Path(path))] if path else []
    return [*layers, *(read_layer(Path(one)) if names_file(one) else _parse_override(one) for one in overrides)]


def names_file(override: str) -> bool:
    """Whether this override is a YAML file, not `key=value`."""
    if os.path.isfile(override):  # noqa: PTH113
        return True
    return "=" not in override and (is_builtin(override) or override.endswith((".yaml", ".yml")))


def to_plain(run: Run) -> dict[str, Any]:
    """The run as nested dicts of plain values, as the hub sends it to actors and commands write it to config.yaml."""
    return dataclasses.asdict(run)


def by_key_path(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of each setting in nested sections, e.g. ("optim.lr", 1e-6)."""
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from by_key_path(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def from_plain(plain: Mapping[str, Any]) -> Run:
    """The inverse of `to_plain`, with the same validation."""
    return _build([Layer("settings", dict(plain), {})])


def to_yaml(run: Run) -> str:
    """The whole resolved configuration as YAML."""
    return yaml.safe_dump(to_plain(run), sort_keys=False)


def read_yaml(path: Path, schema: type) -> dict[str, Any]:
    """The keys in a YAML file, with texts as typed and with ~ expanded in paths.

    Raises ConfigError, one line with file and line number, also for a key that `schema`, a dataclass, does not have.
    """
    return _resolved(read_layer(path), schema)


def _parse_override(override: str) -> Layer:
    key, equals, text = override.partition("=")
    place = f"argument {override!r:.200}"
    if not equals or not key.strip():
        raise ConfigError(f"{place}: an override must look like key=value, e.g. optim.lr=3e-4")
    path = key.strip().split(".")
    value, typed = parse_text(text) if _type_of(path) is str else parse_yaml(text, place)
    *sections, last = path
    values: dict[str, Any] = {last: value}
    typed = {last: typed}
    for section in reversed(sections):
        values, typed = {section: values}, {section: typed}
    return Layer(place, values, typed)


def _type_of(path: Sequence[str]) -> Any:
    """The type of the setting at this key path; None if there is no such setting."""
    kind: Any = Run
    for key in path:
        section: Any = kind
        kind = _hints(section).get(key, (None, False))[0] if dataclasses.is_dataclass(kind) else _value_type(kind)
    return kind


def _value_type(kind: Any) -> Any:
    """The type of the values, if `kind` is that of a mapping, else None."""
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _build(layers: Sequence[Layer]) -> Run:
    try:
        run = OmegaConf.to_object(_merge([(layer.place, _resolved(layer, Run)) for layer in layers]))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    assert isinstance(run, Run)
    return run


def _merge(layers: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """The layers merged over the defaults. Raises ConfigError that names the layer whose value has a wrong type."""
    merged = _structured(Run)
    try:  # one call for all layers, because each call copies everything
        return OmegaConf.merge(merged, *(layer for _, layer in layers))
    except OmegaConfBaseException:  # merge layer by layer to find the one at fault
        for place, layer in layers:
            try:
                merged = OmegaConf.merge(merged, layer)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{place}: {error.full_key}: {str(error.msg).splitlines()[0]}") from None
        raise


@cache  # merging does not change it
def _structured(schema: type[Run]) -> Any:
    return OmegaConf.structured(schema)


def _resolved(layer: Layer, schema: type) -> dict[str, Any]:
    """The values of a layer: texts as typed, with ~ expanded in paths. Raises ConfigError, also for unknown keys."""
    try:
        return _section(layer.values, layer.typed, schema, "")
    except ConfigError as error:
        raise ConfigError(f"{layer.place}: {error}") from None


def _section(values: Mapping[str, Any], typed: Any, schema: type, prefix: str) -> dict[str, Any]:
    """The values of one section. `typed`: as in Layer; `prefix`: the section's key path with a dot behind it, or ""."""
    hints = _hints(schema)
    found = {}
    for key, value in values.items():
        path, inner = f"{prefix}{key}", typed.get(key) if isinstance(typed, Mapping) else None
        if key not in hints:  # OmegaConf would raise an error, too, but without naming the nearest valid key
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown key {path}; {hint}")
        kind, is_path = hints[key]
        found[key] = _value(value, inner, kind, path)
        if is_path and isinstance(found[key], str):
            found[key] = expanded(path, found[key])
    return found


def _value(value: Any, typed: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section with keys, got {value!r}")
        return _section(value, typed, kind, f"{path}.")  # type: ignore[arg-type]
    if _value_type(kind) is not None and isinstance(value, Mapping):
        named = typed if isinstance(typed, Mapping) else {}
        return {key: _value(one, named.get(key), _value_type(kind), f"{path}.{key}") for key, one in value.items()}
    return typed if kind is str and isinstance(typed, str) and value is not None else value


@cache
def _hints(schema: type) -> dict[str, tuple[Any, bool]]:
    """For each key of a section its type, and whether it is a path."""
    types = get_type_hints(schema)
    return {one.name: (types[one.name], one.metadata.get("path", False)) for one in dataclasses.fields(schema)}

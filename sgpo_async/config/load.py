"""Read a YAML file and `key=value` overrides into one frozen `Run`, or raise an error of one line.

Only this module and experiment.py use OmegaConf: all other modules see typed, validated dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpo_async.config.schema import Run
from sgpo_async.errors import ConfigError


class DuplicateKey(yaml.MarkedYAMLError):
    """A key occurs twice in its section."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but dates stay text, and a duplicate key is an error: YAML would silently use the last one.

    YAML 1.1 reads 1e-6 as text. OmegaConf converts it to a number where the field is a number.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises DuplicateKey at the second occurrence of a key."""
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in known:
                raise DuplicateKey(problem=f"{key.value} occurs twice in its section", problem_mark=key.start_mark)
            known.add(name)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read the YAML file at `path`, apply the overrides in their order, validate, return the run.

    An empty path means the defaults. An override is `key=value`, or another YAML file, e.g. configs/paper.yaml.

    Raises ConfigError, one line: file or override, key path, rule and value, or the nearest valid key.
    """
    return _build(_layers(path, overrides))


def given_keys(path: str | Path, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The paths of the keys that the file and the overrides set. Raises ConfigError if they cannot be read."""
    return frozenset(key for _, layer in _layers(path, overrides) for key, _ in by_key_path(layer))


def _layers(path: str | Path, overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(where it comes from, content) of the file and of each override, in the order in which they apply."""
    layers = [(str(path), read_yaml(Path(path)))] if path else []
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            layers.append((override, read_yaml(Path(override))))
        else:
            layers.append((f"argument {override!r}", _parse_override(override)))
    return layers


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
    return _build([("settings", dict(plain))])


def to_yaml(run: Run) -> str:
    """The whole resolved configuration as YAML."""
    return yaml.safe_dump(to_plain(run), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, one line with file and line number."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: {_reason(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections with keys, got a {type(content).__name__}")
    return content


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"argument {override!r}: an override must look like key=value, e.g. optim.lr=3e-4")
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"argument {override!r}: {_reason(error)}") from None
    *sections, last = key.strip().split(".")
    layer: dict[str, Any] = {last: value}
    for section in reversed(sections):
        layer = {section: layer}
    return layer


def _reason(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or error)
    return f"{problem}; keep one of them" if isinstance(error, DuplicateKey) else f"is not YAML ({problem})"


def _build(layers: Sequence[tuple[str, dict[str, Any]]]) -> Run:
    for place, layer in layers:
        check_keys(place, layer, Run, "")
    try:
        run = OmegaConf.to_object(_merge(layers))
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


def check_keys(place: str, layer: Mapping[str, Any], section: type, prefix: str) -> None:
    """Raise ConfigError for an unknown key. OmegaConf would do so too, but without naming the nearest valid key.

    Args:
        place: file or override that `layer` comes from.
        prefix: path of the section, with a dot at its end; "" for the whole configuration.
    """
    hints = get_type_hints(section)
    for key, value in layer.items():
        path = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(hints))}"
            raise ConfigError(f"{place}: unknown key {path}; {hint}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{place}: {path} must be a section with keys, got {value!r}")
            check_keys(place, value, inner, f"{path}.")  # type: ignore[arg-type]

"""Read YAML files and values, with every scalar also as the text that was typed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from sgpo_async.config.builtin import located
from sgpo_async.errors import ConfigError

_DECIMAL = {  # of YAML 1.1's numbers only these; 0x10 is 16
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z"),
    "float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9_]+(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
    ),
}


class Layer(NamedTuple):
    """The keys of one file or one override."""

    place: str  # file or override that an error names
    values: dict[str, Any]
    typed: Any  # `values` with every scalar as the text that was typed; {}: unknown


class DuplicateKey(yaml.MarkedYAMLError):
    """A key occurs twice in its section."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but a duplicate key is an error: YAML would silently use the last one.

    Dates stay text, and so do the octal and sexagesimal numbers of YAML 1.1 (0100 is 64 there, and 12:30 is 750).
    OmegaConf converts a text to a number where the field is a number: 1e-6, and 0100 to 100, but not 12:30.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, _DECIMAL.get(tag.rpartition(":")[2], pattern))
            for tag, pattern in resolvers
            if tag != "tag:yaml.org,2002:timestamp"
        ]
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


def parse_yaml(text: str, place: str) -> tuple[Any, Any]:
    """The value of a YAML text, and the same with every scalar as typed. Raises ConfigError: place, line, reason."""
    try:
        return yaml.load(text, Loader=_Loader) if text else "", yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where and not place.startswith("argument") else ""
        raise ConfigError(f"{place}{line}: {_reason(error)}") from None


def parse_text(text: str) -> tuple[str, str]:
    """A text as typed, twice; a text in YAML's quotes without them."""
    if text[:1] in ("'", '"'):
        with contextlib.suppress(yaml.YAMLError):
            unquoted = yaml.load(text, Loader=yaml.BaseLoader)
            return (unquoted, unquoted) if isinstance(unquoted, str) else (text, text)
    return text, text


def read_layer(path: Path) -> Layer:
    """The keys of a YAML file, or of one that comes with the package. Raises ConfigError, one line with file, line."""
    file = located(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: must be UTF-8, got byte {error.object[error.start]:#x}; convert it"
        ) from None
    content, typed = parse_yaml(text, str(path)) if text else (None, None)
    if content is None:
        return Layer(str(path), {}, {})
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections with keys, got a {type(content).__name__}")
    return Layer(str(path), content, typed)


def _reason(error: Exception) -> str:
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"{problem}; keep one of them" if isinstance(error, DuplicateKey) else f"is not YAML ({problem})"

"""docs/configuration.md, from the schema: python -m sgpo_async.config.page > docs/configuration.md

The schema is the only source: types, defaults and allowed values are those of the dataclasses, a key's text is the
comment beside or above it, and its rules are the calls of `require` in `__post_init__` and the methods it calls.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import re
import sys
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from sgpo_async.config.schema import Run

HEAD = """\
# Configuration

<!-- Written by: python -m sgpo_async.config.page > docs/configuration.md -->

Every key with its type, default and rules, from the schema in
[sgpo_async/config/schema.py](../sgpo_async/config/schema.py). A file of YAML has the sections as nested keys; on the
command line a key is written with dots: `sgpo-async local run.yaml optim.lr=3e-4 hub.max_lag=4`. What is left out has
its default. `sgpo-async init` writes a first file, and `--dry-run` of every command prints the whole resolved one.

An error names file or argument, key, rule, value and, for an unknown key, the nearest valid one. Every number must be
finite, unless its text says otherwise. `~` is expanded in paths, and relative paths are relative to the working
directory.
"""
# By the end of a key's name; the first that fits.
UNITS = {"_per_s": "per second", "_s": "seconds", "_mb": "MB", "_minutes": "minutes", "_tokens": "tokens"}


class Key(NamedTuple):
    """One setting."""

    path: str
    type: str
    default: str
    text: str
    rules: list[str]


class Section(NamedTuple):
    """A dataclass of the schema."""

    path: str  # "" for the run itself
    text: str
    keys: list[Key]


def page() -> str:
    """The text of docs/configuration.md."""
    blocks = [HEAD]
    for section in sections(Run()):
        blocks.append(f"## {section.path or 'The run'}\n")
        blocks += [f"{section.text}\n"] if section.path else []
        blocks += map(_block, section.keys)
    return "\n".join(blocks)


def sections(values: Any, path: str = "") -> Iterator[Section]:
    """The section with these default values, then those within it, in the order of the schema."""
    schema: type[Any] = type(values)
    hints, prefix = get_type_hints(schema), f"{path}." if path else ""
    within = [one for one in dataclasses.fields(schema) if dataclasses.is_dataclass(hints[one.name])]
    texts, rules = _texts(schema, prefix), _rules(schema)
    yield Section(
        path,
        inspect.cleandoc(schema.__doc__ or ""),
        [
            Key(
                prefix + one.name,
                _type(hints[one.name], one),
                f"`{_yaml(getattr(values, one.name))}`",
                texts[one.name],
                rules[prefix + one.name],
            )
            for one in dataclasses.fields(schema)
            if one not in within
        ],
    )
    for one in within:
        yield from sections(getattr(values, one.name), prefix + one.name)


def _block(key: Key) -> str:
    unit = next((f", {unit}" for end, unit in UNITS.items() if key.path.endswith(end)), "")
    text = _prose(". ".join([key.text.rstrip("."), *(one[0].upper() + one[1:] for one in key.rules)]))
    return f"### `{key.path}`\n\n{key.type}{unit}; default: {key.default}\n\n{text}\n"


def _prose(text: str) -> str:
    """A comment or rule as a paragraph of Markdown: a sentence, with links to the pages that it names."""
    parts = re.split(r"(`[^`]*`)", text)  # code is kept as it is
    escaped = "".join(part if part.startswith("`") else re.sub(r"([\\*<{\[])", r"\\\1", part) for part in parts)
    linked = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", escaped)
    word = re.match(r"[a-z]+ ", linked)
    sentence = linked[0].upper() + linked[1:] if word else linked
    return "\n".join(textwrap.wrap(sentence.rstrip(".") + ".", 118, break_long_words=False, break_on_hyphens=False))


def _type(hint: Any, field: dataclasses.Field[Any]) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{_yaml(one)}`" for one in get_args(hint))
    if get_origin(hint) in (dict, list):
        *keys, value = (_type(one, field) for one in get_args(hint))
        return f"mapping from {keys[0]} to {value}" if keys else f"list of {value}"
    if isinstance(hint, UnionType):
        return " or ".join(_type(one, field) for one in get_args(hint))
    if field.metadata.get("path") and hint is str:
        return "path"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "any value"}
    return names.get(hint) or "section with " + ", ".join(f"`{one.name}`" for one in dataclasses.fields(hint))


def _yaml(value: Any) -> str:
    """A value as it is typed in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return ".inf" if value == math.inf else repr(value)
    return '""' if value == "" else str(value)


def _texts(schema: type, prefix: str) -> defaultdict[str, str]:
    """The comment of each key: that above it and that beside it.

    A comment above holds for the keys without one that follow, up to an empty line, whose text then refers to it.
    """
    source = textwrap.dedent(inspect.getsource(schema))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.start[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# noqa")
    }
    lines = source.splitlines()
    texts: defaultdict[str, str] = defaultdict(str)
    owner, end = "", 0
    for node in _body(schema).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or not node.end_lineno:
            continue
        first = node.lineno
        while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = [comments[line][0] for line in range(first, node.lineno)]
        beside = [comments[line][0] for line in range(node.lineno, node.end_lineno + 1) if line in comments]
        name = node.target.id
        owner = name if above else owner if first == end + 1 and not beside else ""
        text = ". ".join(" ".join(part).rstrip(".") for part in (above, beside) if part)
        texts[name] = text or (f"See `{prefix}{owner}`." if owner else "")
        end = node.end_lineno
    return texts


def _rules(schema: type) -> defaultdict[str, list[str]]:
    """For each key its rules in this section's checks, `must ...`, without the values of a run."""
    rules: defaultdict[str, list[str]] = defaultdict(list)
    for owner in (schema, Run):
        for node in _body(owner).body:
            if isinstance(node, ast.FunctionDef):
                _collect(node.body, {}, vars(sys.modules[owner.__module__]), rules)
    return rules


def _collect(
    body: list[ast.stmt], names: dict[str, Any], scope: Mapping[str, Any], rules: dict[str, list[str]]
) -> None:
    """Add the rules of these statements; `names`: the values of loops' variables."""
    for node in body:
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Tuple):
            for one in ast.literal_eval(node.iter):
                _collect(node.body, {**names, node.target.id: one}, scope, rules)
        elif isinstance(node, ast.If | ast.For):
            _collect(node.body, names, scope, rules)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and call.func.id == "require" and len(call.args) > 2:
                path, _, part = _text(call.args[1], names, scope).partition(": ")
                rule = f"{part} {_text(call.args[2], names, scope)}".strip().partition(" = ")[0].replace(" (…)", "")
                if rule not in rules.setdefault(path, []):
                    rules[path].append(rule)


def _text(node: ast.expr, names: dict[str, Any], scope: Mapping[str, Any]) -> str:
    """The text of an expression: what depends on a run is shown as the setting's name, or as …"""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names, scope) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names, scope)
    try:
        return str(eval(compile(ast.Expression(node), "", "eval"), {**scope, **names}))
    except (NameError, AttributeError):
        return "…" if isinstance(node, ast.Name) else ast.unparse(node).replace("self.", "")


def _body(schema: type) -> ast.ClassDef:
    found = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(found, ast.ClassDef)
    return found


if __name__ == "__main__":
    print(page(), end="")

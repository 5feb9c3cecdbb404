"""`sgpo-async configs`: lists the configurations that come with the package, or prints one of them.

sgpo-async configs                         a line for each, and the examples
sgpo-async configs demo > run.yaml         a copy to change
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[NAME]."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="prints this one, e.g. demo or builtin:demo")


def run(args: argparse.Namespace) -> int:
    """Print. Raises ConfigError for an unknown name."""
    from sgpo_async.config.builtin import PREFIX, builtin_names, located, summary
    from sgpo_async.installation import shipped

    if args.name:
        print(located(PREFIX + args.name.removeprefix(PREFIX)).read_text(encoding="utf-8"), end="")
        return 0
    names, examples = builtin_names(), sorted(shipped("examples").glob("*.[pi]*"))
    width = max(map(len, [*names, *(file.name for file in examples)]))
    for name in names:
        print(f"{name:{width}}  {summary(name)}")
    print(f"\nexamples, in {shipped('examples')}:")
    for file in examples:
        print(f"{file.name:{width}}  {_title(file)}")
    return 0


def _title(file: Path) -> str:
    """The first paragraph of a module's docstring, or the first line of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return str(json.loads(text)["cells"][0]["source"][0]).strip("# \n")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())

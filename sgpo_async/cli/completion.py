"""`sgpo-async completion`: prints a script that completes commands, options, configurations and their keys in a shell.

source <(sgpo-async completion bash)                                       in ~/.bashrc, to keep it
source <(sgpo-async completion zsh)                                        in ~/.zshrc, after compinit
sgpo-async completion fish > ~/.config/fish/completions/sgpo-async.fish
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

SHELLS = ("bash", "zsh", "fish")

# The words of each command are in a variable. A name with ":" has to be completed by hand, because bash takes it for
# several words (COMP_WORDBREAKS); a key ends in "=", after which no space is wanted.
BASH = """\
_sgpo_async() {{
    local line=${{COMP_LINE:0:$COMP_POINT}} word candidates key
    word=${{line##*[[:space:]]}}
    local before=(${{line%"$word"}})
    if (( ${{#before[@]}} < 2 )); then
        candidates="{commands}"
    else
        case "${{before[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$candidates" -- "$word"))
    local IFS=$'\\n'  # a file's name may have spaces
    [[ ${{#before[@]}} -ge 2 && $word != -* ]] && COMPREPLY+=($(compgen -f -- "$word"))
    [[ ${{COMPREPLY[0]-}} == *= ]] && compopt -o nospace 2>/dev/null
    if [[ $word == *:* && $COMP_WORDBREAKS == *:* ]]; then
        key=${{word%:*}}:
        COMPREPLY=("${{COMPREPLY[@]#"$key"}}")
    fi
}}
complete -o filenames -F _sgpo_async sgpo-async
"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from sgpo_async.cli.main import COMMANDS

    words = {name: list(_words(name)) for name in COMMANDS}
    print({"bash": _bash, "zsh": lambda *both: ZSH + _bash(*both), "fish": _fish}[args.shell](COMMANDS, words), end="")
    return 0


def _words(name: str) -> Iterator[str]:
    """What can follow a command: its options, and for one with a configuration builtin names and the keys of a run."""
    from sgpo_async.cli.main import parser_of

    for action in parser_of(name)._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if action.metavar == "COMMAND" or (action.choices and not action.option_strings):
            yield from map(str, action.choices or ())
        if action.metavar == "CONFIG" or (name, action.dest) == ("experiment", "files"):
            from sgpo_async.config import builtin_names

            yield from builtin_names()
        if action.metavar == "key=value":
            from sgpo_async.config import Run

            yield from (f"{key}=" for key in _keys(Run))


def _keys(section: type[Any], prefix: str = "") -> Iterator[str]:
    """The paths of all settings in a section of the configuration."""
    types = get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = types[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name


def _bash(commands: Mapping[str, str], words: Mapping[str, list[str]]) -> str:
    cases = "\n".join(f'        {name}) candidates="{" ".join(words[name])}" ;;' for name in commands)
    return BASH.format(commands=" ".join(commands), cases=cases)


def _fish(commands: Mapping[str, str], words: Mapping[str, list[str]]) -> str:
    lines = [
        f"complete -c sgpo-async -n __fish_use_subcommand -f -a {name} -d {shlex.quote(text)}"
        for name, text in commands.items()
    ]
    for name, own in words.items():
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c sgpo-async {seen} -l {word[2:]}" for word in own if word.startswith("--")]
        if others := [word for word in own if not word.startswith("--")]:
            lines.append(f"complete -c sgpo-async {seen} -a '{' '.join(others)}'")
    return "\n".join(lines) + "\n"

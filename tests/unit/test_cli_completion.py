"""`sgpo-async completion`: what a shell proposes after the beginning of a command line."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sgpo_async.cli import main as cli
from sgpo_async.config import builtin_names

BASH = """
source "$1"
shift
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    _sgpo_async
    printf '%s\t' "${COMPREPLY[@]}"
    echo
done
"""
FISH = """
source $argv[1]
for line in $argv[2..]
    echo (complete -C $line | string replace -r '\\t.*' '' | string join \\t)
end
"""


@pytest.fixture(params=["bash", "fish"])
def proposals(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A function: the words that the shell proposes after each line."""
    shell = request.param
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    assert cli.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine to change.yaml").touch()
    command = ["bash", "--norc", "-c", BASH, "bash"] if shell == "bash" else ["fish", "--no-config", "-c", FISH]

    def ask(*lines: str) -> list[list[str]]:
        found = subprocess.run(
            [*command, str(script), *lines], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
        )
        assert not found.stderr
        return [[word for word in line.split("\t") if word] for line in found.stdout.splitlines()]

    return ask


def test_commands_options_configurations_keys_and_files_are_proposed(proposals) -> None:
    command, none, option, key, file, action = proposals(
        "sgpo-async lo",
        "sgpo-async xyz",
        "sgpo-async local --d",
        "sgpo-async local builtin:demo hub.max_la",
        "sgpo-async local mi",
        "sgpo-async strategies ex",
    )
    assert (command, none, option) == (["local"], [], ["--dry-run"])
    assert (key, file, action) == (["hub.max_lag="], ["mine to change.yaml"], ["extract"])


def test_every_command_is_proposed(proposals) -> None:
    (all_commands,) = proposals("sgpo-async ")
    assert set(all_commands) == cli.COMMANDS.keys()


def test_a_name_with_a_colon_is_completed_whatever_the_shell_takes_for_a_word(proposals) -> None:
    """bash divides words at the colon, so its proposals are what follows it; fish does not."""
    for command in ("local", "doctor", "evaluate"):
        names, one = proposals(f"sgpo-async {command} builtin:", f"sgpo-async {command} builtin:experiments/met")
        assert {f"builtin:{name.removeprefix('builtin:')}" for name in names} >= set(builtin_names())
        assert [name.removeprefix("builtin:") for name in one] == ["experiments/methods"]


def test_the_zsh_script_is_that_of_bash_behind_bashcompinit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    bash = capsys.readouterr().out
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == "autoload -Uz bashcompinit && bashcompinit\n" + bash


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "tcsh"])
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err

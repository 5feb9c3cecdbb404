"""The command line: exit codes, errors of one line, and no import of torch before a role runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sgpo_async.cli import main as cli
from sgpo_async.cli.options import record_config
from sgpo_async.config import load
from sgpo_async.errors import SgpoError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


def sgpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with exit code 77 if it has imported torch."""
    program = (
        "import sys; from sgpo_async.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(77 if {'torch', 'transformers', 'tensorboard'} & sys.modules.keys() else code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    "module",
    [
        "cli.main",
        "cli.local",
        "local.show",
        "cli.learner",
        "cli.doctor",
        "cli.evaluate",
        "evaluation.compare",
        "report",
        "metrics",
        "config",
        "wire",
    ],
)
def test_importing_the_module_does_not_import_torch(module: str) -> None:
    program = f"import sys, sgpo_async.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=240, check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str) -> None:
    result = sgpo(command, "--help")
    assert result.returncode in (0, 77), result.stderr
    assert result.stdout.startswith(f"usage: sgpo-async {command}")


def test_the_help_of_a_command_shows_examples() -> None:
    assert "\nsgpo-async strategies check LIBRARY ...\n" in sgpo("strategies", "--help").stdout


def test_the_help_lists_every_command() -> None:
    result = sgpo("--help")
    assert result.returncode == 0
    for command in cli.COMMANDS:
        assert f"  {command}" in result.stdout


def test_data_are_prepared_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(f'{{"problem": "{word}", "answer": "1", "response": "so"}}\n' for word in "abcdefghi"))
    arguments = ["data", "prepare", str(file), "--out", str(tmp_path / "out")]
    result = sgpo(*arguments, "--benchmark", f"own={file}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "of 9 problems none is left: 0 repeat others, 9 are of --benchmark" in result.stderr
    result = sgpo(*arguments)
    assert result.returncode == 0, result.stderr
    assert "rl: 6 problems" in result.stdout


@pytest.mark.parametrize("command", ["local", "learner", "hub", "bench", "evaluate"])
def test_a_dry_run_prints_a_configuration_that_can_be_loaded_again(command: str, tmp_path: Path) -> None:
    result = sgpo(command, DEMO, "--dry-run", "optim.lr=0.25", "local.actors=3")
    assert result.returncode == 0, result.stderr
    assert "# would start:" in result.stdout
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load(again) == load(DEMO, ["optim.lr=0.25", "local.actors=3"])


def test_a_dry_run_of_evaluate_reads_the_problems(tmp_path: Path) -> None:
    file = tmp_path / "aime.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": "2"}\n')
    benchmarks = ["--benchmark", f"own={file}", "--benchmark", "held-out"]
    arguments = ["evaluate", DEMO, "--dry-run", *benchmarks, "--samples", "32"]
    result = sgpo(*arguments)
    assert f"--benchmark own={file} --benchmark held-out --samples 32\n" in result.stdout
    assert "#   own: 1 problems x 32\n#   held-out: 200 problems x 32\n" in result.stdout
    file.write_text("{}")
    result = sgpo(*arguments)
    assert (result.returncode, result.stdout) == (2, "")


def test_a_warning_names_the_earlier_run_that_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load(DEMO, [f"out={tmp_path}"])
    record_config(run, continues=False)
    assert capsys.readouterr().err == ""
    (tmp_path / "demo" / "metrics.jsonl").touch()
    record_config(run, continues=False)
    assert f"{tmp_path}/demo: overwrites an earlier run of this name" in capsys.readouterr().err
    record_config(run, continues=True)
    assert capsys.readouterr().err == ""


def test_a_dry_run_of_local_names_every_process() -> None:
    commands = [
        line for line in sgpo("local", DEMO, "--dry-run", "local.ranks=2").stdout.splitlines() if line[0] == "#"
    ]
    text = "\n".join(commands)
    assert text.count(" actor --hub ") == load(DEMO).local.actors
    assert "--nproc-per-node=2 -m sgpo_async.cli learner" in text
    assert text.count("hub.address=tcp://127.0.0.1:0") == 2


def test_a_configured_hub_address_is_kept() -> None:
    result = sgpo("local", DEMO, "--dry-run", "hub.address=tcp://127.0.0.1:7777")
    assert "127.0.0.1:0" not in result.stdout
    assert "--hub tcp://127.0.0.1:7777" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["local", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["local", DEMO, "optim.rl=1"], "did you mean optim.lr?"),
        (["learner", DEMO, "optim.lr=fast"], "optim.lr"),
        (["hub", DEMO, "steps=0"], "steps must be >= 1, got 0"),
        (
            ["lokal", DEMO],
            "command must be one of " + ", ".join(cli.COMMANDS) + ", got 'lokal'",
        ),
        (["report", "nowhere"], "no metrics.jsonl"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2(arguments: list[str], expected: str) -> None:
    result = sgpo(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_ctrl_c_has_its_own_exit_code_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["local"]) == 130


def test_every_sgpo_error_gives_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_arguments: list[str]) -> int:
        raise SgpoError("disk is full")

    monkeypatch.setattr(cli, "_dispatch", failing)
    assert cli.main(["local"]) == 2
    assert capsys.readouterr().err == "error: disk is full\n"


@pytest.mark.parametrize("name", ["local", "learner", "actor", "hub", "bench"])
def test_launch_files_call_the_same_commands(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env={"PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: sgpo-async {name}")


# Some are not complete: paper.yaml and sharp.yaml override other files, and experiment files complete trial.yaml.
COMPLETE = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in {"paper", "sharp", "trial"})


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert load(path).name == yaml.safe_load(path.read_text())["name"]


def test_an_invalid_hub_address_of_an_actor_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["actor", "--hub", "foo"]) == 2
    assert "must look like tcp://HOST:PORT, got 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    [
        *((["local", DEMO, "--dry-run"], buffered) for buffered in (True, False)),
        *((["--version"], buffered) for buffered in (True, False)),
        (["local", "--help"], True),  # without a buffer, argparse drops its help silently
    ],
)
def test_a_command_whose_output_nobody_reads_ends_silently(arguments: list[str], buffered: bool) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, *([] if buffered else ["-u"]), "-m", "sgpo_async.cli", *arguments],
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=240, check=False, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(write)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_to_another_process_is_not_taken_for_the_end_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise BrokenPipeError("a child has ended")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(BrokenPipeError, match="a child has ended"):
        cli.main(["local"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_output_cannot_show_are_escaped(encoding: str, tmp_path: Path) -> None:
    work = tmp_path / "wörk.jsonl"
    work.write_text("")
    for arguments, code, text in (
        (["strategies", "stats", str(work)], 0, "mean score"),
        (["local", DEMO, "name=Übung-β", "--dry-run"], 0, r"\u03b2"),
        (["local", str(tmp_path / "β.yaml")], 2, r"\u03b2.yaml: cannot be read"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "sgpo_async.cli", *arguments], capture_output=True, timeout=240, check=False,
            cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        assert text in (result.stderr if code else result.stdout).decode(encoding)
        assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_an_option_must_be_a_finite_number(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", DEMO, f"--temperature={number}", "--dry-run"]) == 2
    assert capsys.readouterr().err == f"error: --temperature must be a finite number, got {number}\n"


@pytest.mark.parametrize("argument", ["steps=3", "--dry-run"])
def test_the_bench_of_weights_takes_no_settings_of_a_run(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "weights", argument]) == 2
    assert f"error: bench weights must not be given settings of a run or --dry-run, got '{argument}'" in (
        capsys.readouterr().err
    )

"""The command: words in, exit code and one line out, and no torch until a role really runs."""

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


def sgpo(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which ends with 77 if it has imported torch."""
    program = (
        "import sys; from sgpo_async.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(77 if {'torch', 'transformers', 'tensorboard'} & sys.modules.keys() else code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
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
def test_importing_it_does_not_import_torch(module: str) -> None:
    program = f"import sys, sgpo_async.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=240, check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_every_command(command: str) -> None:
    answer = sgpo(command, "--help")
    assert answer.returncode in (0, 77), answer.stderr
    assert answer.stdout.startswith(f"usage: sgpo-async {command}")


def test_help_shows_the_examples_of_a_command() -> None:
    assert "\nsgpo-async strategies check LIBRARY ...\n" in sgpo("strategies", "--help").stdout


def test_the_commands_are_listed() -> None:
    answer = sgpo("--help")
    assert answer.returncode == 0
    for command in cli.COMMANDS:
        assert f"  {command}" in answer.stdout


def test_data_are_prepared_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(f'{{"problem": "{word}", "answer": "1", "response": "so"}}\n' for word in "abcdefghi"))
    words = ["data", "prepare", str(file), "--out", str(tmp_path / "out")]
    answer = sgpo(*words, "--benchmark", f"own={file}")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "of 9 problems none is left: 0 repeat others, 9 are of --benchmark" in answer.stderr
    answer = sgpo(*words)
    assert answer.returncode == 0, answer.stderr
    assert "rl: 6 problems" in answer.stdout


@pytest.mark.parametrize("command", ["local", "learner", "hub", "bench", "evaluate"])
def test_a_dry_run_prints_a_configuration_that_can_be_loaded_again(command: str, tmp_path: Path) -> None:
    answer = sgpo(command, DEMO, "--dry-run", "optim.lr=0.25", "local.actors=3")
    assert answer.returncode == 0, answer.stderr
    assert "# would start:" in answer.stdout
    again = tmp_path / "again.yaml"
    again.write_text(answer.stdout)
    assert load(again) == load(DEMO, ["optim.lr=0.25", "local.actors=3"])


def test_a_dry_run_of_evaluate_reads_the_problems(tmp_path: Path) -> None:
    file = tmp_path / "aime.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": "2"}\n')
    words = ["evaluate", DEMO, "--dry-run", "--benchmark", f"own={file}", "--samples", "32", "--benchmark", "held-out"]
    answer = sgpo(*words)
    assert f"--benchmark own={file} --benchmark held-out --samples 32\n" in answer.stdout
    assert "#   own: 1 problems x 32\n#   held-out: 200 problems x 32\n" in answer.stdout
    file.write_text("{}")
    answer = sgpo(*words)
    assert (answer.returncode, answer.stdout) == (2, "")


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
    answer = sgpo("local", DEMO, "--dry-run", "hub.address=tcp://127.0.0.1:7777")
    assert "127.0.0.1:0" not in answer.stdout
    assert "--hub tcp://127.0.0.1:7777" in answer.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
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
def test_a_mistake_is_one_line_and_code_2(words: list[str], expected: str) -> None:
    answer = sgpo(*words)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_ctrl_c_has_its_own_code_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["local"]) == 130


def test_every_sgpo_error_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_words: list[str]) -> int:
        raise SgpoError("disk: is full")

    monkeypatch.setattr(cli, "_dispatch", failing)
    assert cli.main(["local"]) == 2
    assert capsys.readouterr().err == "error: disk: is full\n"


@pytest.mark.parametrize("name", ["local", "learner", "actor", "hub", "bench"])
def test_launch_files_call_the_same_commands(name: str, tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env={"PATH": ""},
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"usage: sgpo-async {name}")


WHOLE = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs" / "paper.yaml"})  # that one lies over others


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert load(path).name == yaml.safe_load(path.read_text())["name"]


def test_an_invalid_hub_address_of_an_actor_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["actor", "--hub", "foo"]) == 2
    assert "must look like tcp://HOST:PORT, got 'foo'" in capsys.readouterr().err

"""Configurations that come with the package, by name; what messages call files and commands where they run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_async import installation
from sgpo_async.cli import main as cli
from sgpo_async.config import builtin_names, load
from sgpo_async.config.builtin import located, summary
from sgpo_async.config.experiment import load_experiment
from sgpo_async.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def test_every_file_in_configs_has_a_name_and_a_first_sentence() -> None:
    files = {located(name) for name in builtin_names()}
    assert files == set(CONFIGS.rglob("*.yaml")) and len(files) >= 18
    for name in builtin_names():
        assert summary(name)[-1:] == ".", f"{name}: {summary(name)}"
    assert summary("builtin:paper") == "The paper's training setting and nothing else (arXiv 2606.24064, Eq. 1 to 7)."


def test_a_builtin_name_means_its_file_in_every_place() -> None:
    by_path = load(CONFIGS / "demo.yaml", [str(CONFIGS / "paper.yaml"), "steps=3"])
    assert load("builtin:demo", ["builtin:paper", "steps=3"]) == by_path
    assert by_path.algorithm.limiter == "mask" and by_path.steps == 3
    assert load("builtin:demo.yaml") == load("builtin:demo")
    by_name = load_experiment("builtin:experiments/methods")
    assert by_name == load_experiment(CONFIGS / "experiments" / "methods.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("builtin:dmeo", "did you mean builtin:demo?"),
        ("builtin:methods", "did you mean builtin:experiments/methods?"),
        ("builtin:xyz", "'sgpo-async configs' lists them"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_one(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["local", name], ["local", "builtin:demo", name], ["experiment", name], ["configs", name]):
        assert cli.main(arguments) == 2
        error = f"error: {name}: no configuration of this name comes with sgpo-async; {hint}\n"
        assert capsys.readouterr().err == error


@pytest.mark.parametrize("command", ["learner", "sft", "hub", "doctor", "plan", "bench", "evaluate"])
def test_every_command_takes_a_builtin_name_and_passes_it_on(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "builtin:demo", "builtin:paper", "--dry-run"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert any(f" {command} builtin:demo builtin:paper" in line for line in comments), comments


def test_the_list_has_every_configuration_and_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split(" ")[0] for line in lines]
    for name in [*builtin_names(), *(file.name for file in (ROOT / "examples").iterdir() if file.is_file())]:
        assert starts.count(name) == 1, name
    assert cli.main(["configs", "demo"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "demo.yaml").read_text()


def test_an_error_in_a_builtin_configuration_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("# Broken.\nsteps: many\n")
    monkeypatch.setattr("sgpo_async.config.builtin.shipped", lambda _: tmp_path)
    with pytest.raises(ConfigError, match=r"builtin:broken: steps: "):
        load("builtin:broken")


def test_commands_for_torchrun_exist_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert installation.under_torchrun("sft") == ["launch/sft.py"]
    assert installation.sglang_for_cpus() == "on a CPU: make sglang-cpu"
    monkeypatch.chdir(tmp_path)
    module = installation.under_torchrun("sft")
    shown = subprocess.run(
        [sys.executable, *module, "--help"], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT
    )
    assert shown.stdout.startswith("usage: sgpo-async sft")
    file = installation.sglang_for_cpus().split()[7]
    assert "--no-deps sglang==" in Path(file).read_text()


def test_no_message_names_what_an_installed_package_lacks() -> None:
    """Only installation.py may name files of a checkout in a string; comments and docstrings may.

    The writers of pages in docs/ are run in a checkout alone.
    """
    writers = [ROOT / "sgpo_async" / name / "page.py" for name in ("cli", "config", "metrics")]
    found = []
    for path in sorted({*(ROOT / "sgpo_async").rglob("*.py")} - {*writers}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and node.body and isinstance(node.body[0], ast.Expr)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "installation.py":
                text = node.value
                if id(node) in docstrings:  # of a command, what follows the first paragraph is in its --help
                    text = text.partition("\n\n")[2] if path.parent.name == "cli" and node.lineno == 1 else ""
                if any(word in text for word in ("launch/", "configs/", "make sglang", "make setup", "docs/")):
                    found.append(f"{path.relative_to(ROOT)}: {text!r:.80}")
    assert found == ["sgpo_async/processes/stacks.py: 'launch/'"]

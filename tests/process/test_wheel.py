"""The package as it is installed: the wheel's files, and its commands in a folder without the checkout.

The wheel is built and installed without a network, into an environment that finds the libraries of this one, but not
the checkout.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["steps=2", "tasks.held_out=8", "learner.problems_per_step=4", "local.ranks=1", "local.actors=1"]
DEADLINE_S = 400


def call(command: list[str], folder: Path, *, code: int = 0) -> str:
    """Run a command in `folder` as a user's shell would; return its output."""
    unwanted = ("PYTHONPATH", "SGPO_ASYNC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=folder,
        env=environment | {"TMPDIR": str(temporary(folder)), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def temporary(folder: Path) -> Path:
    """The temporary folder of the commands in `folder`."""
    path = folder.parent / f"{folder.name}-temporary"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as `python -m build` does, and that from a copy of the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("sgpo_async", "configs", "examples", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call([sys.executable, "-c", f"from setuptools.build_meta import *; build_sdist({str(out)!r})"], source)
    (archive,) = out.glob("*.tar.gz")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    call([sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(out), str(archive)], source)
    (built,) = out.glob("*.whl")
    return built


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to work in."""

    bin: Path
    folder: Path

    def __call__(self, *arguments: str, code: int = 0) -> str:
        return call([str(self.bin / "sgpo-async"), *arguments], self.folder, code=code)


@pytest.fixture(scope="module")
def sgpo(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    own = sysconfig.get_path("purelib")
    (packages / "libraries.pth").write_text(f"{own}\n")  # its .pth files, one of which names a checkout, are not read
    target = ["--python", str(home / "bin" / "python"), "install", "-q", "--no-deps", "--no-index"]
    call([sys.executable, "-m", "pip", *target, str(wheel)], home)
    return Installed(home / "bin", tmp_path_factory.mktemp("work"))


def test_the_wheel_holds_the_package_its_data_configurations_and_examples_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sgpo_async").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for folder, suffixes in {"configs": {".yaml", ".json"}, "examples": {".py", ".ipynb"}}.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
        expected |= {f"sgpo_async/shipped/{path.relative_to(ROOT)}" for path in files}
    for needed in ("py.typed", "tasks/cues_base/model.safetensors", "engines/sglang/cpu/requirements.txt"):
        assert f"sgpo_async/{needed}" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def left_behind(sgpo: Installed) -> set[str]:
    """What is in the temporary folder, but for the cache that torch has there for each user."""
    return {path.name for path in temporary(sgpo.folder).iterdir() if not path.name.startswith("torchinductor_")}


def test_what_is_installed_is_the_wheel(sgpo: Installed) -> None:
    where = "import sgpo_async; print(sgpo_async.__file__)"
    found = call([str(sgpo.bin / "python"), "-c", where], sgpo.folder)
    assert found.startswith(str(sgpo.bin.parent))


def test_a_whole_run_of_a_builtin_configuration(sgpo: Installed) -> None:
    """It leaves the policy readable and nothing in the temporary folder, and no log has a line of transformers."""
    output = sgpo("local", "builtin:demo", *SMALL)
    folder = sgpo.folder / "runs" / "demo"
    assert "report: runs/demo/report.html" in output
    assert json.loads((folder / "summary.json").read_text())["ledger"]["trained"] == 8
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in (folder / "policy").iterdir()} == {0o666 & ~umask}
    assert left_behind(sgpo) == set()
    logs = {file.name: file.read_text() for file in (folder / "logs").iterdir()}
    assert {"hub.log", "learner.log", "actor-0.log"} <= logs.keys()
    assert not [name for name, text in logs.items() if "[transformers]" in text or "loss_type" in text]


def test_a_new_configuration_is_accepted(sgpo: Installed) -> None:
    written = sgpo("init", "first.yaml", "--yes")
    assert "sgpo-async local first.yaml" in written
    output = sgpo("local", "first.yaml", "builtin:paper", "--dry-run")
    assert "limiter: mask" in output and " learner " in output


@pytest.mark.slow
def test_messages_name_what_is_there(sgpo: Installed) -> None:
    """Ranks are started by the command that the error names, and clean up behind torchrun if they end well."""
    refused = sgpo("learner", "builtin:demo", code=2)
    assert refused == ("error: learner: RANK is not set; start it by torchrun -m sgpo_async.cli learner builtin:demo\n")
    module = refused.split("torchrun ")[1].split()
    torchrun = [str(sgpo.bin / "python"), "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    before = left_behind(sgpo)
    assert "name: x" in call([*torchrun, "--log-dir=/dev/null", *module, "name=x", "--dry-run"], sgpo.folder)
    warmed = call(
        [*torchrun, *module[:2], "sft", "builtin:demo", "sft.problems=8", "sft.epochs=1", "name=y"], sgpo.folder
    )
    assert (sgpo.folder / "runs" / "y" / "warmup" / "model.safetensors").exists(), warmed
    assert left_behind(sgpo) == before


def test_examples_run_from_the_installed_package(sgpo: Installed) -> None:
    listed = sgpo("configs")
    assert "builtin:experiments/methods" in listed and "tool_use.py" in listed
    (folder,) = [line.split(" in ")[1].rstrip(":") for line in listed.splitlines() if line.startswith("examples, in ")]
    assert Path(folder).is_relative_to(sgpo.bin.parent)
    sums = call([str(sgpo.bin / "python"), f"{folder}/word_problems.py", "sums", "--count", "8"], sgpo.folder)
    assert "problems" in sums
    shelves = "from sgpo_async.tasks.environments import *; from sgpo_async.shipped.examples.tool_use import Shelves"
    call([str(sgpo.bin / "python"), "-c", shelves], sgpo.folder)


def test_a_notebook_s_calls_work(sgpo: Installed) -> None:
    program = (
        "from sgpo_async import load_config; print(load_config('builtin:demo', 'builtin:paper').algorithm.limiter)"
    )
    assert call([str(sgpo.bin / "python"), "-c", program], sgpo.folder) == "mask\n"

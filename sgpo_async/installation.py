"""What lies where, and what is called how: in a checkout, and where the package is installed.

    checkout                        installed from a wheel
    configs/, examples/             sgpo_async/shipped/configs, sgpo_async/shipped/examples: setup.py puts them there
    torchrun launch/learner.py      torchrun -m sgpo_async.cli learner
    make sglang-cpu                 the lines at the head of sgpo_async/engines/sglang/cpu/requirements.txt

Every message that names one of them asks here. It names what a checkout has only in the checkout's own folder, because
such paths are right nowhere else; the other forms are right there, too.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = "shipped"


def shipped(name: str) -> Path:
    """The folder `configs` or `examples` that came with the package."""
    installed = PACKAGE / SHIPPED / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def example_module(name: str) -> str:
    """The name under which Python imports an example: in a checkout, from its own folder."""
    return f"sgpo_async.{SHIPPED}.examples.{name}" if (PACKAGE / SHIPPED).is_dir() else f"examples.{name}"


def under_torchrun(command: str) -> list[str]:
    """What torchrun must start for a rank of this command, e.g. `learner`."""
    return [f"launch/{command}.py"] if _in_checkout() else ["-m", "sgpo_async.cli", command]


def sglang_for_cpus() -> str:
    """How to make SGLang's environment for CPUs, to be put into brackets."""
    if _in_checkout():
        return "on a CPU: make sglang-cpu"
    return f"on a CPU: as the head of {PACKAGE}/engines/sglang/cpu/requirements.txt says"


def _in_checkout() -> bool:
    """Whether the working directory is that of the checkout from which this package runs."""
    root = PACKAGE.parent
    return Path.cwd() == root and (root / "launch" / "learner.py").is_file()

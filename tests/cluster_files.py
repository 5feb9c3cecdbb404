"""The commands in launch/cluster, as the schedulers would start them, and what their own parsers make of them."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.run import get_args_parser

from sgpo_async.config import Run, load

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "launch/cluster"
KUBERNETES = CLUSTER / "kubernetes"
RECORD = """#!/usr/bin/env bash
line=$(printf '%s\\037' "${0##*/}" "$@")
printf '%s\\n' "$line" >> "$RECORD"  # in one write: commands run side by side
case "${0##*/} $*" in
"scontrol show hostnames"*) printf 'node0\\nnode1\\n' ;;
"scontrol show node"*) echo "   NodeAddr=10.0.0.1 NodeHostName=node0 Version=22.05" ;;
esac
"""


@dataclass(frozen=True)
class Command:
    """One command of `sgpo-async`, parsed."""

    name: str
    args: argparse.Namespace
    torchrun: argparse.Namespace | None = None  # the options of the torchrun that starts it
    run: Run | None = field(default=None, repr=False)  # its configuration, if it has one


def parsed(words: Sequence[str]) -> Command:
    """Parse a command line with the parsers of the programs that it names. Exits or raises if one refuses it."""
    program, *rest = words
    match Path(program).name:
        case "again.sh":
            return parsed(rest)
        case "torchrun":
            torchrun = get_args_parser().parse_args(rest)
            script, rest = torchrun.training_script, torchrun.training_script_args
            assert (script, rest[:1]) == ("sgpo_async.cli", ["learner"]) if torchrun.module else script
            name = "learner" if torchrun.module else Path(script).stem
            command = _command(name, rest[1:] if torchrun.module else rest)
            return Command(command.name, command.args, torchrun, command.run)
        case "sgpo-async":
            return _command(rest[0], rest[1:])
    raise AssertionError(f"no command of this project: {words}")


def _command(name: str, words: Sequence[str]) -> Command:
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"sgpo_async.cli.{name}").add_arguments(parser)
    args = parser.parse_intermixed_args(list(words))
    return Command(name, args, run=load(args.config, args.overrides) if hasattr(args, "config") else None)


def documents() -> list[dict[str, Any]]:
    """Every object in the files of kubernetes/, without its components."""
    files = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return [one for file in files for one in yaml.safe_load_all((KUBERNETES / file).read_text())]


def pods() -> dict[str, dict[str, Any]]:
    """The pod of each workload, by its name: hub, learner, actor."""
    return {
        one["metadata"]["name"].removeprefix("sgpo-"): one["spec"]["template"]["spec"]
        for one in documents()
        if one["kind"] in ("Job", "Deployment")
    }


def kubernetes_words(role: str, **values: str) -> list[str]:
    """The command of the container of one role, with `values` for variables such as $(POD_IP)."""
    (container,) = pods()[role]["containers"]
    words = []
    for word in container["args"]:
        for name, value in values.items():
            word = word.replace(f"$({name})", value)
        words.append(word.replace("/config/run.yaml", str(KUBERNETES / "run.yaml")))
    return words


def recorded(script: str, folder: Path, *arguments: str, **environment: str) -> Iterator[list[str]]:
    """Run a script of bash in `folder`, and yield every command of ours or of Slurm that it would start."""
    for name in ("bin/srun", "bin/scontrol", "bin/squeue", "bin/scancel", "launch/cluster/again.sh"):
        _recorder(folder / name)
    for name in ("torchrun", "sgpo-async"):
        _recorder(folder / ".venv/bin" / name)
    for name in ("configs", "launch/cluster/cluster.yaml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    record = folder / "record"
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    defined: Mapping[str, str] = os.environ | {"PATH": path, "RECORD": str(record), "HOME": str(folder)} | environment
    command = ["bash", "-c", script, "script", *arguments]
    done = subprocess.run(command, check=False, cwd=folder, env=defined, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in record.read_text().splitlines():
        yield line.rstrip("\037").split("\037")


def _recorder(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(RECORD)
    file.chmod(0o755)

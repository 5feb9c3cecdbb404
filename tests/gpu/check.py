"""All checks that need one GPU, in one call: `python tests/gpu/check.py --out FOLDER` (or `make gpu-check`).

    wheels ──▶ one part after another, each a process with a time limit ──▶ FOLDER/gpu-check.json

The file is rewritten whenever a part has a new measurement, so an interrupted run keeps its results. Parts for which no
time is left are marked "skipped". Packages that the machine lacks are installed from --wheels (`make gpu-wheels`
downloads them) to FOLDER, for these processes only. The exit status is 0 if every part passed.

`--device cpu --size tiny` runs the same code on a CPU. `tests/process/test_gpu_check.py` does so to find errors without
using GPU time. This file needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Parts in the order of their importance, with their limits in seconds. Later parts may use time that is left over.
LIMITS_S = {"demo": 210, "mismatch": 60, "losses": 60, "step": 150, "weights": 60, "tests": 120}
LEAST_S = 10.0  # a part is skipped if less time is left
PACKAGES = (
    "torch", "transformers", "safetensors", "tokenizers", "numpy", "pyzmq", "msgpack", "omegaconf", "triton",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "liger-kernel",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the parts; print one line per part, then the path of the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file and of each part's output")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".gpu-wheels", help="default: %(default)s, if it exists")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for a test run")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time limit of all parts together (default: %(default)g)"
    )
    parser.add_argument("--parts", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    options = parser.parse_args(arguments)
    check = Check(options)
    for part in options.parts:
        check.run(part)
    check.save()
    print(check.path)
    return 0 if all(part["status"] == "passed" for part in check.report["parts"].values()) else 1


class Check:
    """Runs the parts and writes the report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._deadline = time.monotonic() + 60 * options.minutes
        self._folder: Path = options.out.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path = self._folder / "gpu-check.json"
        self._environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": options.device,
            "size": options.size,
            "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
            "card": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        }
        self._install(options.wheels)
        self.report |= {"versions": self._versions(), "parts": {}}
        self.save()

    def run(self, part: str) -> None:
        """Run one part until its end or its time limit, and add its measurements to the report."""
        left = self._deadline - time.monotonic()
        if left < LEAST_S:
            self._note(part, {"status": "skipped", "reason": "no time left"})
            return
        measured = self._folder / f"{part}.json"
        measured.unlink(missing_ok=True)
        log = self._folder / f"{part}.log"
        options = [f"--device={self._options.device}", f"--size={self._options.size}", f"--to={measured}"]
        limit_s, began = min(LIMITS_S[part], left), time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/gpu/parts.py"), part, *options],
                cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        result: dict[str, Any] = {"status": "running"}
        while process.poll() is None and time.monotonic() - began < limit_s:
            time.sleep(0.2)
            if (found := _read(measured)) != result.get("figures"):
                result["figures"] = found
                self._note(part, result, quiet=True)
        if process.poll() is None:
            result |= {"status": "timed out", "limit_s": limit_s}
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            result["status"] = "failed" if process.returncode else "passed"
        result |= {"seconds": round(time.monotonic() - began, 1), "figures": _read(measured)}
        if result["status"] != "passed":
            result["output"] = log.read_text(errors="replace")[-4000:]
        self._note(part, result)

    def save(self) -> None:
        """Replace the JSON file atomically, so that readers never see an incomplete file."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def _note(self, part: str, result: dict[str, Any], *, quiet: bool = False) -> None:
        self.report["parts"][part] = result
        self.save()
        if not quiet:
            print(f"{part:10}{result['status']:10}{result.get('seconds', 0):7.1f} s", flush=True)

    def _install(self, wheels: Path) -> None:
        """Install the wheels into a folder of their own, which comes first on the Python path."""
        found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
        self.report["wheels"] = [wheel.name for wheel in found]
        if not found:
            return
        site = self._folder / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
        done = subprocess.run(
            [*command, "--upgrade", "--target", str(site), *map(str, found)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"error: --wheels: cannot install the wheels in {wheels}:\n{done.stderr[-2000:]}")
        self._environment["PYTHONPATH"] = os.pathsep.join((str(site), str(ROOT)))

    def _versions(self) -> dict[str, str]:
        code = (
            "import json, platform, sys\nfrom importlib.metadata import distributions\n"
            "found = {}\n"
            "for d in distributions(): found.setdefault(d.metadata['Name'].lower().replace('_', '-'), d.version)\n"
            "found['python'] = platform.python_version()\n"
            "print(json.dumps({name: found[name] for name in ['python', *sys.argv[1:]] if name in found}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *PACKAGES],
            env=self._environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        versions: dict[str, str] = json.loads(done.stdout)
        return versions


def _output(*command: str) -> list[str] | None:
    """The output lines of a command; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[:-1]


def _read(path: Path) -> Any:
    """The measurements of a part so far; None if there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a run needs of disk and open files: checks of the doctor that every command repeats before it starts anything.

They need no torch, and return what they found. They raise CheckFailed, one line with the remedy.
"""

from __future__ import annotations

import importlib.util
import resource
import shutil
import tempfile
from pathlib import Path

from sgpo_async.config.schema import CHECKPOINTS, Run
from sgpo_async.errors import CheckFailed
from sgpo_async.local.run_folder import newest_checkpoint
from sgpo_async.model.folder import stored_parameters

OPEN_FILES = 256  # of one process; a Torch RPC session with one peer was measured to have up to 150
OPEN_FILES_PER_ACTOR = 8  # of the hub; measured: 3
LOGS = 16 * 10**6  # bytes for logs, metrics and the hub's state


def check_start(run: Run, *, checkpoints: bool) -> None:
    """Check disk and open files. `checkpoints`: also what only the learner needs: room for those, and its trackers."""
    open_files(run.local.actors)
    disk(run, stored_parameters(run.model.path) if checkpoints else 0)
    if checkpoints:
        trackers(run)


def check_resume(run: Run, checkpoints: str = CHECKPOINTS) -> None:
    """Check that there is a checkpoint if the run must resume from one. `checkpoints`: the name of their folder."""
    folder = Path(run.folder, checkpoints)
    if run.learner.resume is True and newest_checkpoint(folder) is None:
        remedy = "correct name and out, or begin anew with learner.resume=false"
        raise CheckFailed(f"learner.resume=true: {folder} has no checkpoint", remedy)


def open_files(actors: int) -> str:
    """Check that this process and those that it starts may open enough files, sockets included."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_PER_ACTOR * actors
    if limit != resource.RLIM_INFINITY and limit < needed:
        found = f"open files: this process may have {limit}, and a run with {actors} actors needs {needed}"
        raise CheckFailed(found, f"raise the limit: ulimit -n {max(1024, needed)}")
    return "no limit" if limit == resource.RLIM_INFINITY else f"up to {limit} in each process"


def trackers(run: Run) -> str:
    """Check that the packages of the trackers are installed."""
    for name in run.learner.trackers:
        installed(name, "learner.trackers")
    return ", ".join(run.learner.trackers) or "none"


def installed(tracker: str, key: str) -> None:
    """Check that the package of this tracker, which has the same name, is installed."""
    spec = importlib.util.find_spec(tracker)
    if spec is None or spec.origin is None:  # no origin: a folder of this name, as W&B makes where it runs
        found = f"{key}: {tracker} needs the package {tracker}, which is not installed"
        raise CheckFailed(found, f"pip install 'sgpo-async[{tracker}]', or leave {tracker} out")


def disk(run: Run, parameters: int) -> str:
    """Check the disk for logs, checkpoints and the policy of a model with so many parameters.

    A checkpoint holds them in float32, and AdamW's moments; there are those kept and the one being written. Of trained
    adapters it holds these alone, which count as a hundredth of the model here.
    """
    policy, trained = 4 * parameters, parameters // 100 if run.learner.lora.rank else parameters
    one = int((4 + run.optim.state_bytes) * trained)
    count = run.learner.keep_checkpoints + 1 if run.learner.checkpoint_every or run.learner.checkpoint_minutes else 1
    folder, needed = existing(run.folder), LOGS + count * one + policy
    require_writable(folder, "out", "set out=DIR to a folder that can be written")
    room = free(folder) + (_taken(Path(run.folder) / CHECKPOINTS) if run.learner.resume else 0)
    if room < needed:
        what = f"{count} checkpoint{'s' * (count > 1)}, the policy and logs" if parameters else "logs"
        found = f"out: {folder} has {size(room)}, and {what} need {size(needed)}"
        remedy = "free some space, set out=DIR" + (", or lower learner.keep_checkpoints" if count > 1 else "")
        raise CheckFailed(found, remedy)
    return f"{size(room)}; checkpoints: {count} of {size(one)}"


def existing(folder: str | Path) -> Path:
    """The folder, or its nearest parent that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def size(count: int) -> str:
    """A number of bytes as text, e.g. 1.34 MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def free(folder: Path) -> int:
    """The number of bytes that can still be written there."""
    return shutil.disk_usage(folder).free


def require_writable(folder: Path, key: str, remedy: str) -> None:
    """Raise CheckFailed unless a file can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise CheckFailed(f"{key}: {folder} cannot be written ({error.strerror})", remedy) from None


def _taken(folder: Path) -> int:
    """Bytes in the files below `folder`: of earlier checkpoints, which new ones replace."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

"""Every error is one line for the user, with place and remedy, and leaves no process behind."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_support import RealRun, RunProcess, chat_model, real_run, until

from sgpo_async.model.folder import load_tokenizer, tokenizer_fingerprint
from sgpo_async.processes.torchrun import torchrun
from sgpo_async.transport import Dealer, Mailbox, create_keys
from sgpo_async.transport.token import token_of
from sgpo_async.wire.records import Hello, Welcome

pytestmark = pytest.mark.process


def errors(process: RunProcess, code: int = 2) -> list[str]:
    """Wait until the process exits, with the code of user errors; return its error lines."""
    assert process.wait() == code, process.output
    assert "Traceback" not in process.output
    return [line for line in process.output.splitlines() if line.startswith("error: ")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RealRun]:
    with real_run(tmp_path, "steps=1", "hub.address=tcp://127.0.0.1:0") as run:
        yield run


def write_bad_problems(folder: Path) -> None:
    (folder / "sums.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2"}\n')


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path={folder}/none", "model.path: {folder}/none: no such folder"),
        ("tasks.path={folder}/sums.jsonl", "{folder}/sums.jsonl:2: no column 'answer'"),
        ("hub.keys={folder}/none", "hub.keys: {folder}/none/server.key_secret is missing"),
        ("out=/dev/full/runs", "out: /dev/full cannot be written (Not a directory); set out=DIR"),
    ],
)
def test_a_wrong_configuration_ends_the_command_with_one_line(
    run: RealRun, tmp_path: Path, override: str, expected: str
) -> None:
    write_bad_problems(tmp_path)
    more = ["tasks.source=file"] if override.startswith("tasks") else []
    (line,) = errors(run.local(override.format(folder=tmp_path), *more))
    assert expected.format(folder=tmp_path) in line
    run.assert_cleaned_up()


def test_a_port_in_use_ends_the_command_with_one_line(run: RealRun) -> None:
    run.hub()
    address = run.address()
    second = run.start("second-hub", "launch/hub.py", str(run.config), f"hub.address={address}", "name=second")
    for process in (run.local(f"hub.address={address}", "name=third"), second):
        (line,) = errors(process)
        assert f"hub.address: {address} is in use" in line


def test_an_actor_with_another_tokenizer_is_refused(run: RealRun, tmp_path: Path) -> None:
    run.hub()
    other = chat_model(tmp_path / "other")
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(other)))
    learner = Mailbox(Dealer(run.address(), max_bytes=2**20))
    learner.send(Hello(role="learner", name="learner-0", tokenizer="0123456789abcdef", token=token_of(run.folder)))
    until(lambda: any(isinstance(answer, Welcome) for answer in learner.receive(0.1)), "a welcome")
    (line,) = errors(run.actor("actor", "--model", str(other)), code=3)  # it concerns this actor only
    assert "0123456789abcdef" in line and fingerprint in line and "set model.path of actor to the learner's" in line
    learner.close()


@pytest.mark.slow
def test_an_actor_with_wrong_keys_is_refused(run: RealRun, tmp_path: Path) -> None:
    for folder in ("ours", "theirs"):
        create_keys(tmp_path / folder)
    run.hub(f"hub.keys={tmp_path}/ours")
    strangers = [run.actor("theirs", "--keys", f"{tmp_path}/theirs"), run.actor("none")]
    for stranger in strangers:
        (line,) = errors(stranger)
        assert f"{run.address()} refuses the connection" in line and "the same hub.keys" in line


def test_damaged_weights_are_refused(run: RealRun, tmp_path: Path) -> None:
    """The error is that of the learner, found among the output of torchrun, or of the actor: which one is faster."""
    broken = chat_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    (line,) = errors(run.local(f"model.path={broken}", "local.actors=1", "local.ranks=1"))
    who, _, what = line.partition(": model.path: ")
    assert who in ("error: the learner ended with code 1", "error: actor-0 ended with code 2")
    assert what.startswith("cannot load a causal language model")
    run.assert_cleaned_up()


def on_disk_of(megabytes: int, disk: Path, beside: str = "") -> tuple[str, ...]:
    """A prefix of a command, which then runs in a mount namespace of its own with a file system of that size at `disk`.

    `beside` is a shell command that runs beside it. Skips the test where such namespaces cannot be made.
    """
    disk.mkdir()
    private = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={megabytes}m none {disk}"
    if subprocess.run([*private, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = f"{mount} && " + (f"{{ {beside} & }} && " if beside else "") + 'exec "$@"'
    return (*private, "sh", "-c", script, "sh")


def test_a_disk_that_fills_up(run: RealRun, tmp_path: Path) -> None:
    """Something else fills it during the run, but for a megabyte. The learner and the hub both write to it.

    Whichever of them notices first ends the run, with one line that names what could not be written.
    """
    disk = tmp_path / "disk"
    fill = f"while [ ! -e {disk}/run/metrics.jsonl ]; do sleep 0.1; done; head -c 31m /dev/zero > {disk}/other"
    prefix = on_disk_of(32, disk, f"({fill})")
    local = run.start("local", "launch/local.py", str(run.config), f"out={disk}", "local.actors=1", prefix=prefix)
    (line,) = errors(local)
    assert f"{disk}/run/" in line and "disk is full" in line and "free some space" in line
    assert "not started again" not in line
    run.assert_cleaned_up()


@pytest.mark.parametrize("megabytes", [1, *(pytest.param(one, marks=pytest.mark.slow) for one in (4, 16))])
@pytest.mark.parametrize("role", ["local", "hub", "learner"])
def test_a_disk_that_is_too_small_ends_a_command_before_it_starts_anything(
    run: RealRun, tmp_path: Path, role: str, megabytes: int
) -> None:
    if (role, megabytes) == ("hub", 16):
        pytest.skip("room for the hub, which writes no checkpoints")
    disk = tmp_path / "disk"
    command = ["-m", "sgpo_async.cli", role, str(run.config), f"out={disk}"]
    if role == "learner":
        command = [*torchrun(1)[1:], *command]
    started = run.start(role, *command, prefix=on_disk_of(megabytes, disk))
    code = started.wait()
    lines = [line for line in started.output.splitlines() if line.startswith("error: ")]
    assert code == (1 if role == "learner" else 2), "torchrun has an exit code of its own"
    assert len(lines) == 1 and f"error: out: {disk} has " in lines[0] and "free some space, set out=DIR" in lines[0]
    run.assert_cleaned_up()

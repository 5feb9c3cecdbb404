"""Every error is one line for the user, with place and remedy, and leaves no process behind."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_support import RealRun, RunProcess, chat_model, real_run, until

from sgpo_async.model.folder import load_tokenizer, tokenizer_fingerprint
from sgpo_async.transport import Dealer, Mailbox, create_keys
from sgpo_async.wire.records import Hello, Welcome

pytestmark = pytest.mark.process


def errors(process: RunProcess) -> list[str]:
    """Wait until the process exits with code 2, that of user errors; return its error lines."""
    assert process.wait() == 2, process.output
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
        ("out=/dev/full/runs", "/dev/full/runs/run/config.yaml: cannot be written (Not a directory)"),
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
    overrides = (f"hub.address={address}", "name=other")
    second = run.start("second-hub", "launch/hub.py", str(run.config), *overrides)
    for process in (run.local(*overrides), second):
        (line,) = errors(process)
        assert f"hub.address: {address} is in use" in line


def test_an_actor_with_another_tokenizer_is_refused(run: RealRun, tmp_path: Path) -> None:
    run.hub()
    other = chat_model(tmp_path / "other")
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(other)))
    learner = Mailbox(Dealer(run.address(), max_bytes=2**20))
    learner.send(Hello(role="learner", name="learner-0", tokenizer="0123456789abcdef"))
    until(lambda: any(isinstance(answer, Welcome) for answer in learner.receive(0.1)), "a welcome")
    (line,) = errors(run.actor("actor", "--model", str(other)))
    assert "0123456789abcdef" in line and fingerprint in line and "set model.path of actor to the learner's" in line
    learner.close()


def test_an_actor_with_wrong_keys_is_refused(run: RealRun, tmp_path: Path) -> None:
    for folder in ("ours", "theirs"):
        create_keys(tmp_path / folder)
    run.hub(f"hub.keys={tmp_path}/ours")
    strangers = [run.actor("theirs", "--keys", f"{tmp_path}/theirs"), run.actor("none")]
    for stranger in strangers:
        (line,) = errors(stranger)
        assert f"{run.address()} refuses the connection" in line and "the same hub.keys" in line


def test_damaged_weights_are_refused(run: RealRun, tmp_path: Path) -> None:
    """The error is the learner's own, found among the output of torchrun."""
    broken = chat_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    (line,) = errors(run.local(f"model.path={broken}", "local.actors=1", "local.ranks=1"))
    assert line.startswith("error: the learner ended with code 1: model.path: cannot load a causal language model")
    run.assert_cleaned_up()


def test_a_full_disk_ends_the_run_with_one_line(run: RealRun, tmp_path: Path) -> None:
    """The file system has 1 MB, in a mount namespace of its own: too little for a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    private = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if subprocess.run([*private, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount namespace")
    in_namespace = (*private, "sh", "-c", f'{mount} && exec "$@"', "sh")
    local = run.start("local", "launch/local.py", str(run.config), f"out={disk}", "local.actors=1", prefix=in_namespace)
    (line,) = errors(local)
    assert f"{disk}/run/checkpoints/step-00000001: cannot write the checkpoint: the disk is full" in line
    run.assert_cleaned_up()

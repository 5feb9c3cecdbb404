"""What a user sees when something is wrong: one line that says what, where and how to mend it, and nothing left."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_support import RealRun, Started, chat_model, real_run, until

from sgpo_async.model.folder import load_tokenizer, tokenizer_fingerprint
from sgpo_async.transport import Dealer, Mailbox, create_keys
from sgpo_async.wire.records import Hello, Welcome

pytestmark = pytest.mark.process


def errors(started: Started) -> list[str]:
    """Its error lines, once it has ended with the exit code of errors that a user can mend."""
    assert started.ended() == 2, started.output
    assert "Traceback" not in started.output
    return [line for line in started.output.splitlines() if line.startswith("error: ")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RealRun]:
    with real_run(tmp_path, "steps=1", "hub.address=tcp://127.0.0.1:0") as run:
        yield run


def bad_problems(place: Path) -> str:
    (place / "sums.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2"}\n')
    return f"{place}/sums.jsonl"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.path={place}/none", "model.path: {place}/none: no such folder"),
        ("tasks.path={place}/sums.jsonl", "{place}/sums.jsonl:2: no column 'answer'"),
        ("hub.keys={place}/none", "hub.keys: {place}/none/server.key_secret is missing"),
        ("out=/dev/full/runs", "/dev/full/runs/run/config.yaml: cannot be written (Not a directory)"),
    ],
)
def test_a_wrong_configuration_ends_the_command_with_one_line(
    run: RealRun, tmp_path: Path, word: str, expected: str
) -> None:
    more = ["tasks.source=file"] if word.startswith("tasks") and bad_problems(tmp_path) else []
    (line,) = errors(run.local(word.format(place=tmp_path), *more))
    assert expected.format(place=tmp_path) in line
    run.assert_no_trace()


def test_a_port_in_use_ends_the_hub_with_one_line(run: RealRun) -> None:
    run.hub()
    address = run.address()
    words = (f"hub.address={address}", "name=other")
    started = [run.local(*words), run.start("other-hub", "launch/hub.py", str(run.config), *words)]
    for process in started:
        (line,) = errors(process)
        assert f"hub.address: {address} is in use" in line


def test_an_actor_with_another_tokenizer_is_refused(run: RealRun, tmp_path: Path) -> None:
    run.hub()
    other = chat_model(tmp_path / "other")
    theirs = tokenizer_fingerprint(load_tokenizer(str(other)))
    learner = Mailbox(Dealer(run.address(), max_bytes=2**20))
    learner.send(Hello(role="learner", name="learner-0", tokenizer="0123456789abcdef"))
    until(lambda: any(isinstance(answer, Welcome) for answer in learner.receive(0.1)), "a welcome")
    (line,) = errors(run.actor("actor", "--model", str(other)))
    assert "0123456789abcdef" in line and theirs in line and "set model.path of actor to the learner's" in line
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
    """The learner's complaint, found among what torchrun says."""
    broken = chat_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    (line,) = errors(run.local(f"model.path={broken}", "local.actors=1", "local.ranks=1"))
    assert line.startswith("error: the learner ended with code 1: model.path: cannot load a causal language model")
    run.assert_no_trace()


def test_a_full_disk(run: RealRun, tmp_path: Path) -> None:
    """A file system of a megabyte, in a mount namespace of its own: the weights of a checkpoint do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    private = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if subprocess.run([*private, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    small = (*private, "sh", "-c", f'{mount} && exec "$@"', "sh")
    local = run.start("local", "launch/local.py", str(run.config), f"out={disk}", "local.actors=1", before=small)
    (line,) = errors(local)
    assert f"{disk}/run/checkpoints/step-00000001: cannot write the checkpoint: the disk is full" in line
    run.assert_no_trace()

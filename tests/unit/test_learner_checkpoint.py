"""Checkpoints on one rank: written in the background, which one is loaded, and what happens to a damaged one."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgpo_async.errors import CheckpointError
from sgpo_async.learner import checkpoint
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.policy import Policy
from sgpo_async.learner.step import Stepper
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import load_model
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")


def learner(*, tied: bool = False) -> Stepper:
    return cases.stepper(cases.settings(), cases.tiny_model(tied=tied, dtype=torch.float32))


def save(folder: Path, step: int, stepper: Stepper, *, keep: int = 9) -> Path:
    with CheckpointWriter(folder, keep=keep) as writer:
        saved = Saved({"step": step}, b"the hub")
        writer.save(step=step, module=stepper.policy, optimiser=stepper.optimiser, saved=saved)
    return folder / f"step-{step:08d}"


def parameters(stepper: Stepper) -> list[Tensor]:
    return [parameter.full_tensor().detach().clone() for parameter in stepper.policy.parameters()]


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) is None
    stepper = learner()
    for step in (9, 10):
        save(tmp_path, step, stepper)
    (tmp_path / ".step-00000011").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-00000010"


def test_a_step_that_is_reached_again_is_overwritten(tmp_path: Path) -> None:
    stepper = learner()
    save(tmp_path, 1, stepper)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    path, second = save(tmp_path, 1, stepper), learner()
    checkpoint.restore(path, module=second.policy, optimiser=second.optimiser)
    for saved, restored in zip(stepper.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(saved.full_tensor(), restored.full_tensor())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_pruning_keeps_the_newest_and_later_steps_of_an_earlier_attempt(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000002", "step-00000009", ".step-00000002", "step-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    save(tmp_path, 3, learner(), keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000002", "step-00000003", "step-00000009", "step-of-mine"}


def test_all_files_are_synced_before_the_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, rename = [], Path.rename

    def checked(old: Path, new: Path) -> Path:
        if old.is_dir():  # torch also renames files inside the folder
            assert {old, *old.iterdir()} <= set(synced)
            synced.append(new)
        return rename(old, new)

    def sync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", checked)
    saved = save(tmp_path, 1, learner())
    assert synced[-2:] == [saved, tmp_path]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "changed": _flip,
}
FILES = ["progress.json", ".metadata", "__0_0.distcp", "hub.state", "random-0.pt", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, name: str
) -> None:
    older = save(tmp_path, 1, learner())
    newer = Path(shutil.copytree(older, tmp_path / "step-00000002"))
    DAMAGES[damage](newer / name)
    assert checkpoint.newest_whole(tmp_path) == older
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{newer}: the checkpoint is damaged (rank 0: " in line and line.endswith("; trying the one before")
    assert "\n" not in line
    DAMAGES[damage](older / name)
    with pytest.raises(
        CheckpointError, match=r"all checkpoints are damaged \(step-00000001, step-00000002\)"
    ) as caught:
        checkpoint.newest_whole(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_its_list_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1, learner())
    for content in ("{}", "[]", '{"files": 1}', '{"files": {"hub.state": {}}}'):
        (path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
            checkpoint.newest_whole(tmp_path)


def test_the_manifest_has_every_other_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, learner())
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert {name: entry["bytes"] for name, entry in files.items()} == {n: (path / n).stat().st_size for n in files}


def test_the_error_for_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    path, other = save(tmp_path, 1, learner()), learner(tied=True)
    with pytest.raises(CheckpointError, match="step-00000001: cannot read the checkpoint, or it belongs to") as caught:
        checkpoint.restore(path, module=other.policy, optimiser=other.optimiser)
    assert "\n" not in str(caught.value)


class Gate:
    """Holds the background thread of a writer at the first file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self._sync = threading.Event(), checkpoint._sync
        monkeypatch.setattr(checkpoint, "_sync", self._held)

    def _held(self, path: Path) -> None:
        assert self.open.wait(120)
        self._sync(path)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds the weights and moments of its own step. The next one waits for it."""
    gate, stepper, restored = Gate(monkeypatch), learner(), learner()
    shards = [cases.shard_of(cases.groups(seed=seed), problems=4, step=seed) for seed in range(3)]
    stepper.update(shards[0])
    with CheckpointWriter(tmp_path, keep=2) as writer:
        arguments = {"module": stepper.policy, "optimiser": stepper.optimiser, "saved": Saved({"step": 1}, b"")}
        expected = parameters(stepper)
        writer.save(step=1, **arguments)
        lines = [stepper.update(shard) for shard in shards[1:]]
        assert not all(map(torch.equal, expected, parameters(stepper)))
        assert [path.name for path in tmp_path.iterdir()] == [".step-00000001"]
        gate.open.set()
        writer.save(step=3, **arguments)
        assert (tmp_path / "step-00000001").exists()
    checkpoint.restore(tmp_path / "step-00000001", module=restored.policy, optimiser=restored.optimiser)
    assert all(map(torch.equal, expected, parameters(restored)))
    assert [restored.update(shard) for shard in shards[1:]] == lines
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-00000003"


def test_the_wait_for_a_checkpoint_looks_at_files_that_are_renamed_meanwhile(tmp_path: Path) -> None:
    draft = tmp_path / ".step-00000001"
    draft.mkdir()
    (draft / "__0_0.distcp").write_bytes(bytes(7))
    (draft / ".metadata.tmp").symlink_to("gone")  # is listed, and has no size, as if it was renamed in between
    with CheckpointWriter(tmp_path, keep=1) as writer:
        assert writer._moved() == 7
        checkpoint._describe(draft / "__0_0.distcp", writer._count)
        assert writer._moved() == 14  # that a file is read again for the manifest is progress


def _failing(_: Path) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("when", ["next", "end"])
def test_a_failed_checkpoint_raises_at_the_next_one_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stepper = learner()
    older = save(tmp_path, 1, stepper)
    monkeypatch.setattr(checkpoint, "_sync", _failing)
    writer = CheckpointWriter(tmp_path, keep=2)
    arguments = {"module": stepper.policy, "optimiser": stepper.optimiser, "saved": Saved({"step": 2}, b"")}
    writer.save(step=2, **arguments)
    with pytest.raises(
        CheckpointError, match=r"step-00000002: cannot write the checkpoint \(rank 0: OSError"
    ) as caught:
        writer.save(step=3, **arguments) if when == "next" else writer.wait()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [older]
    assert checkpoint.newest_whole(tmp_path) == older


def test_the_failure_of_a_checkpoint_does_not_hide_the_error_that_ended_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stepper = learner()
    monkeypatch.setattr(checkpoint, "_sync", _failing)
    with pytest.raises(KeyError, match="training"), CheckpointWriter(tmp_path, keep=2) as writer:
        saved = Saved({"step": 2}, b"")
        writer.save(step=2, module=stepper.policy, optimiser=stepper.optimiser, saved=saved)
        raise KeyError("training")
    assert "step-00000002: cannot write the checkpoint (rank 0: OSError" in caplog.text


@pytest.mark.parametrize(("minutes", "passed", "due"), [(0.0, 1e9, False), (2.0, 119.0, False), (2.0, 120.0, True)])
def test_a_checkpoint_is_due_by_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, passed: float, due: bool
) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with CheckpointWriter(tmp_path, keep=1, minutes=minutes) as writer:
        now[0] += passed
        assert writer.due(by_steps=False) == due
        assert writer.due(by_steps=True)
        stepper = learner()
        saved = Saved({"step": 1}, b"")
        writer.save(step=1, module=stepper.policy, optimiser=stepper.optimiser, saved=saved)
        assert not writer.due(by_steps=False)


def test_a_model_with_tied_embeddings_is_restored(tmp_path: Path) -> None:
    stepper, second = learner(tied=True), learner(tied=True)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    path = save(tmp_path, 1, stepper)
    checkpoint.restore(path, module=second.policy, optimiser=second.optimiser)
    shard = cases.shard_of(cases.groups(seed=1), problems=4, step=1)
    assert stepper.update(shard) == second.update(shard)


def test_a_new_run_sets_aside_the_checkpoints_of_an_earlier_run(tmp_path: Path) -> None:
    """Every further call uses a new folder, and nothing is deleted."""
    folder, stepper = tmp_path / "checkpoints", learner()
    assert checkpoint.set_checkpoints_aside(folder) is None
    for step, number in ((7, 1), (5, 2)):
        save(folder, step, stepper)
        moved = checkpoint.set_checkpoints_aside(folder)
        assert moved == tmp_path / f"checkpoints.earlier-{number}"
        assert [path.name for path in moved.iterdir()] == [f"step-{step:08d}"]
        assert checkpoint.newest_whole(folder) is None
    save(folder, 3, stepper)
    assert checkpoint.newest_whole(folder) == folder / "step-00000003"


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_of_a_checkpoint_can_be_read_by_a_model_that_is_not_sharded(tmp_path: Path, tied: bool) -> None:
    stepper = learner(tied=tied)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    path = save(tmp_path, 1, stepper)
    assert checkpoint.newest_complete(tmp_path) == path
    plain = Policy(cases.tiny_model(tied=tied, dtype=torch.float32, seed=1))
    checkpoint.read_weights(path, plain)
    for own, saved in zip(plain.parameters(), parameters(stepper), strict=True):
        assert torch.equal(own, saved)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "beginning"])
def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path, damage: str, name: str) -> None:
    path = save(tmp_path, 1, learner())
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "beginning":
        (path / name).write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="step-00000001: cannot be read, or belongs to another model") as caught:
        checkpoint.read_weights(path, Policy(cases.tiny_model(dtype=torch.float32)))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, learner())
    other = Policy(load_model(model_folder("builtin:cues"), device="cpu", dtype="float32"))
    with pytest.raises(CheckpointError, match="cannot be read, or belongs to another model"):
        checkpoint.read_weights(path, other)


def test_no_checkpoint_is_complete_in_an_empty_folder(tmp_path: Path) -> None:
    assert checkpoint.newest_complete(tmp_path) is None
    assert checkpoint.newest_complete(tmp_path / "missing") is None
    (tmp_path / ".step-00000003").mkdir()
    assert checkpoint.newest_complete(tmp_path) is None

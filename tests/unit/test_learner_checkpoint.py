"""Checkpoints on one rank: which checkpoint is loaded, and the error for a damaged checkpoint."""

from pathlib import Path

import pytest
import torch

from sgpo_async.errors import CheckpointError
from sgpo_async.learner import checkpoint
from sgpo_async.learner.checkpoint import Saved
from sgpo_async.learner.step import Stepper
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")


def learner(*, tied: bool = False) -> Stepper:
    return cases.stepper(cases.settings(), cases.tiny_model(tied=tied, dtype=torch.float32))


def save(folder: Path, step: int, stepper: Stepper) -> Path:
    saved = Saved({"step": step}, b"")
    return checkpoint.save(folder, step=step, module=stepper.policy, optimiser=stepper.optimiser, saved=saved)


def test_the_latest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    stepper = learner()
    for step in (9, 10):
        save(tmp_path, step, stepper)
    (tmp_path / ".step-00000011").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"


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
    save(tmp_path, 3, learner())
    checkpoint.prune(tmp_path, step=3, keep=2)
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


@pytest.mark.parametrize("missing", ["progress.json", ".metadata", "__0_0.distcp", "hub.state"])
def test_the_error_for_an_incomplete_checkpoint_is_one_line(tmp_path: Path, missing: str) -> None:
    stepper = learner()
    path = save(tmp_path, 1, stepper)
    (path / missing).unlink()
    with pytest.raises(CheckpointError, match="step-00000001: cannot read the checkpoint") as caught:
        checkpoint.restore(path, module=stepper.policy, optimiser=stepper.optimiser)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_truncated_checkpoint_is_one_line(tmp_path: Path) -> None:
    stepper = learner()
    path = save(tmp_path, 1, stepper)
    data = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="step-00000001: cannot read the checkpoint") as caught:
        checkpoint.restore(path, module=stepper.policy, optimiser=stepper.optimiser)
    assert "\n" not in str(caught.value)


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
    assert checkpoint.set_aside(folder) is None
    for step, number in ((7, 1), (5, 2)):
        save(folder, step, stepper)
        moved = checkpoint.set_aside(folder)
        assert moved == tmp_path / f"checkpoints.earlier-{number}"
        assert [path.name for path in moved.iterdir()] == [f"step-{step:08d}"]
        assert checkpoint.latest(folder) is None
    save(folder, 3, stepper)
    assert checkpoint.latest(folder) == folder / "step-00000003"

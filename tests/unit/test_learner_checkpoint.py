"""Checkpoints on one rank: which one is taken, and what is said of a broken one."""

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


def test_the_latest_whole_one_is_taken(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    stepper = learner()
    for step in (9, 10):
        save(tmp_path, step, stepper)
    (tmp_path / ".step-00000011").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"


def test_a_step_that_is_reached_again_is_written_anew(tmp_path: Path) -> None:
    stepper = learner()
    save(tmp_path, 1, stepper)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    place, second = save(tmp_path, 1, stepper), learner()
    checkpoint.restore(place, module=second.policy, optimiser=second.optimiser)
    for ours, theirs in zip(stepper.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_are_kept_and_those_of_an_earlier_life_that_got_further(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000002", "step-00000009", ".step-00000002", "step-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    save(tmp_path, 3, learner())
    checkpoint.prune(tmp_path, step=3, keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000002", "step-00000003", "step-00000009", "step-of-mine"}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, rename = [], Path.rename

    def checked(old: Path, new: Path) -> Path:
        if old.is_dir():  # torch renames files in it
            assert {old, *old.iterdir()} <= set(synced)
            synced.append(new)
        return rename(old, new)

    def sync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", checked)
    saved = save(tmp_path, 1, learner())
    assert synced[-2:] == [saved, tmp_path]


@pytest.mark.parametrize("broken", ["progress.json", ".metadata", "__0_0.distcp", "hub.state"])
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, broken: str) -> None:
    stepper = learner()
    place = save(tmp_path, 1, stepper)
    (place / broken).unlink()
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read") as caught:
        checkpoint.restore(place, module=stepper.policy, optimiser=stepper.optimiser)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short_is_one_line(tmp_path: Path) -> None:
    stepper = learner()
    place = save(tmp_path, 1, stepper)
    data = (place / "__0_0.distcp").read_bytes()
    (place / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read"):
        checkpoint.restore(place, module=stepper.policy, optimiser=stepper.optimiser)


def test_tied_embeddings(tmp_path: Path) -> None:
    stepper, second = learner(tied=True), learner(tied=True)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    place = save(tmp_path, 1, stepper)
    checkpoint.restore(place, module=second.policy, optimiser=second.optimiser)
    shard = cases.shard_of(cases.groups(seed=1), problems=4, step=1)
    assert stepper.update(shard) == second.update(shard)


def test_a_run_that_begins_afresh_is_never_resumed_from_another_s(tmp_path: Path) -> None:
    """Twice, and nothing is lost."""
    folder, stepper = tmp_path / "checkpoints", learner()
    assert checkpoint.set_aside(folder) is None
    for step, number in ((7, 1), (5, 2)):
        save(folder, step, stepper)
        place = checkpoint.set_aside(folder)
        assert place == tmp_path / f"checkpoints.earlier-{number}"
        assert [path.name for path in place.iterdir()] == [f"step-{step:08d}"]
        assert checkpoint.latest(folder) is None
    save(folder, 3, stepper)
    assert checkpoint.latest(folder) == folder / "step-00000003"
